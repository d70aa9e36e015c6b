"""The page loads nothing from elsewhere: browsers are told so with every answer."""

from __future__ import annotations

from typing import Any

__all__ = ["POLICY", "OwnHostOnly"]

POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; object-src 'none'; base-uri 'self'; frame-ancestors 'self'"


class OwnHostOnly:
    """ASGI middleware that adds a content security policy: scripts, styles, fonts, pictures and connections of the own host only."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        async def with_policy(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ()), (b"content-security-policy", POLICY.encode())]
                message = {**message, "headers": headers}
            await send(message)

        await self.app(scope, receive, with_policy if scope["type"] == "http" else send)
