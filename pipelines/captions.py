"""Cleaning of web captions and prompts, as text-to-image models trained on web data expect it.

The order of the rules is DeepFloyd IF's, which diffusers (Apache-2.0) and LlamaGen use as well. Broken unicode is repaired by ftfy
and html read by beautifulsoup4 where they are installed; without them html is stripped by the standard library and unicode left.
"""

from __future__ import annotations

import html
import importlib.util
import re
import urllib.parse
from html.parser import HTMLParser

_DOMAINS = r"[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b\/?(?!@)"
_DASHES = "[\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d]+"
_EXTENSIONS = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"


def _rules(*pairs: tuple[str, str]) -> tuple[tuple[re.Pattern[str], str], ...]:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)


_BEFORE_HTML = _rules(
    ("<person>", "person"),
    (rf"\b((?:https?:(?:\/{{1,3}}|[a-zA-Z0-9%])|{_DOMAINS}))", ""),
    (rf"\b((?:www:(?:\/{{1,3}}|[a-zA-Z0-9%])|{_DOMAINS}))", ""),
)
_AFTER_HTML = _rules(
    (r"@[\w\d]+\b", ""),  # handles
    ("[\u31c0-\u31ef]+", ""),  # CJK strokes
    ("[\u31f0-\u31ff]+", ""),  # Katakana phonetic extensions
    ("[\u3200-\u32ff]+", ""),  # enclosed CJK letters
    ("[\u3300-\u33ff]+", ""),  # CJK compatibility
    ("[\u3400-\u4dbf]+", ""),  # CJK ideographs, extension A
    ("[\u4dc0-\u4dff]+", ""),  # hexagrams
    ("[\u4e00-\u9fff]+", ""),  # CJK ideographs
    (_DASHES, "-"),
    ("[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"'),
    ("[\u2018\u2019]", "'"),
    (r"&quot;?", ""),
    (r"&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # network addresses
    (r"\d:\d\d\s+$", ""),  # article ids
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"[\S]+\.(?:{_EXTENSIONS})", ""),  # file names
    (r"[\"\']{2,}", '"'),
    (r"[\.]{2,}", " "),
    (r"[#\u00ae\u2022\u00a9\u2122&@\u00b7\u00ba\u00bd\u00be\u00bf\u00a1\u00a7~\)\(\]\[\}\{\|\\/\*]{1,}", " "),
    (r"\s+\.\s+", " "),
)
_JOINERS = re.compile(r"[-_]")
_LAST = _rules(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # product codes
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_EXTENSIONS})(\simage[s]?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    ("\\b\\d+\\.?\\d*[x\u0445\u00d7]\\d+\\.?\\d*\\b", ""),  # sizes
    (r"\b\s+\:\s+", ": "),
    (r"(\D[,\./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"\']([\w\W]+)[\"\']$", r"\1"),
    (r"^[\'\_,\-\:;]", ""),
    (r"[\'\_,\-\:\-\+]$", ""),
    (r"^\.\S+$", ""),
)


def clean_caption(text: str) -> str:
    """One pass of cleaning over `text`; authors who clean at all clean twice."""
    text = urllib.parse.unquote_plus(str(text)).strip().lower()
    text = _strip_html(_apply(_BEFORE_HTML, text))
    text = _apply(_AFTER_HTML, text)
    if len(_JOINERS.findall(text)) > 3:
        text = _JOINERS.sub(" ", text)
    if importlib.util.find_spec("ftfy"):
        import ftfy

        text = ftfy.fix_text(text)
    text = html.unescape(html.unescape(text))
    return _apply(_LAST, text).strip()


def _apply(rules: tuple[tuple[re.Pattern[str], str], ...], text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


class _TextOnly(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []

    def handle_data(self, data: str) -> None:
        self.parts.append(data)


def _strip_html(text: str) -> str:
    if importlib.util.find_spec("bs4"):
        from bs4 import BeautifulSoup

        return BeautifulSoup(text, features="html.parser").text
    parser = _TextOnly()
    parser.feed(text)
    parser.close()
    return "".join(parser.parts)
