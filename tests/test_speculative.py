"""Speculative decoding: exactness of every draft source, rows at their own pace, loosened verification, clear errors."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from tiny_llamagen import class_pipeline, tiny_transformer
from tiny_unified import unified_pipeline

import armm
from armm.decoding.guidance import Guidance
from armm.decoding.next_token import NextTokenDecoding
from armm.decoding.sampling import Sampler
from armm.decoding.speculative import (
    Draft,
    DraftModel,
    DraftTree,
    GroupedVerifier,
    JacobiWindow,
    MatchVerifier,
    MedusaDrafts,
    MedusaHeads,
    Numbers,
    RelaxedVerifier,
    SpeculativeDecoding,
    TokenRecycling,
    TypicalVerifier,
    Verifier,
)
from armm.decoding.speculative.stream import WindowStream
from armm.decoding.speculative.verify import Evidence
from armm.decoding.token_shuffle import TokenShuffleDecoding
from armm.model import AutoregressiveModel

TREE = DraftTree.from_paths([[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0]])


def heads_for(model: AutoregressiveModel, number: int = 3) -> MedusaHeads:
    torch.manual_seed(9)
    heads = MedusaHeads(model.trunk.dim, model.vocab_size, number)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return heads.eval()


def sources(model: AutoregressiveModel, small: AutoregressiveModel | None = None) -> dict[str, object]:
    """Every draft source, for `model`."""
    found: dict[str, object] = {
        f"jacobi {init}": JacobiWindow(5, init) for init in ("random", "repeat_left", "likeliest_left", "repeat_above")
    }
    found["jacobi coupled"] = JacobiWindow(5, "repeat_left", redraw="coupled")
    found |= {"recycling": TokenRecycling(4), "recycling tree": TokenRecycling(tree=TREE)}
    found |= {"medusa": MedusaDrafts(heads_for(model)), "medusa tree": MedusaDrafts(heads_for(model), TREE)}
    if small is not None:
        found["draft model"] = DraftModel(small, 4)
    return found


def small_transformer() -> AutoregressiveModel:
    """Another tiny model of the same codes."""
    torch.manual_seed(3)
    trunk = {"dim": 16, "num_layers": 1, "num_heads": 1, "mlp_hidden": 16, "rotary_axes": [8, 8]}
    condition = {"type": "class", "num_classes": 10}
    return AutoregressiveModel(vocab_size=48, transformer=trunk, condition=condition, grid=(4, 4)).eval()


PIPE = class_pipeline()
SOURCES = sources(PIPE.transformer, small_transformer())
LABELS = [1, 2, 3]


def draw(acceleration: armm.Speculative | None, labels=LABELS, **arguments) -> torch.Tensor:
    if acceleration is None:
        PIPE.disable_acceleration()
    else:
        PIPE.enable_acceleration(acceleration)
    return PIPE(class_labels=labels, output_type="latent", **arguments).images


PLAIN = {scale: draw(None, do_sample=False, guidance_scale=scale) for scale in (1.0, 2.0)}


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


# ------------------------------------------------------------------ exactness


@pytest.mark.parametrize("name", SOURCES)
def test_greedy_is_identical(name: str) -> None:
    torch.manual_seed(0)
    for verifier, scale in ((Verifier(), 1.0), (Verifier(), 2.0), (MatchVerifier(), 2.0)):
        settings = {"do_sample": False, "guidance_scale": scale}
        assert torch.equal(draw(armm.Speculative(SOURCES[name], verifier), **settings), PLAIN[scale])


@pytest.mark.parametrize("verifier", [GroupedVerifier(), GroupedVerifier(0), RelaxedVerifier(0.0)], ids=str)
def test_greedy_with_loosening_at_zero_is_identical(verifier: Verifier) -> None:
    """Groups change nothing without sampling: only the likeliest code has any probability."""
    torch.manual_seed(0)
    assert torch.equal(draw(armm.Speculative(JacobiWindow(5), verifier), do_sample=False), PLAIN[2.0])


@pytest.mark.parametrize("name", SOURCES)
def test_match_is_the_result_of_plain_sampling(name: str) -> None:
    acceleration = armm.Speculative(SOURCES[name], MatchVerifier())
    plain = draw(None, generator=generators(3), top_k=20)
    assert torch.equal(draw(acceleration, generator=generators(3), top_k=20), plain)
    one = torch.Generator().manual_seed(4)
    plain = draw(None, generator=one)
    assert torch.equal(draw(acceleration, generator=one.manual_seed(4)), plain)
    noise = torch.empty(3, 16, 48).exponential_(generator=one)
    assert torch.equal(draw(acceleration, noise=noise), draw(None, noise=noise))


class TinyRuns:
    """A model of few codes on a grid of 1 x 3, whose every outcome can be counted, and its exact distribution."""

    def __init__(self) -> None:
        torch.manual_seed(11)
        trunk = {"dim": 16, "num_layers": 1, "num_heads": 1, "mlp_hidden": 16, "rotary_axes": [8, 8]}
        condition = {"type": "class", "num_classes": 2}
        self.model, self.small = (
            AutoregressiveModel(vocab_size=4, transformer=trunk, condition=condition, grid=(1, 3)).eval()
            for _ in range(2)
        )
        for model in (self.model, self.small):
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    torch.nn.init.normal_(parameter, std=0.4)

    @torch.no_grad()
    def probabilities(self, sampler: Sampler, guidance: Guidance) -> torch.Tensor:
        """Of all 64 outcomes, under plain sampling."""
        ids = torch.tensor(list(itertools.product(range(4), repeat=3)))
        model = self.model
        logits = model(ids[:, :-1], model.condition(labels=torch.zeros(64, dtype=torch.long)))
        null = model(ids[:, :-1], model.null_condition(64))
        p = sampler.filter(guidance.combine(torch.cat([logits, null]))).softmax(-1)
        return p.gather(-1, ids[..., None])[..., 0].prod(1)

    def counts(
        self, source: object, verifier: Verifier, sampler: Sampler, guidance: Guidance, runs: int
    ) -> torch.Tensor:
        decoding = SpeculativeDecoding(NextTokenDecoding(), source, verifier)
        condition = self.model.condition(labels=torch.zeros(runs, dtype=torch.long))
        generator = torch.Generator().manual_seed(1)
        null = self.model.null_condition(runs)
        ids = decoding(self.model, condition, null, sampler=sampler, guidance=guidance, noise=generator).ids
        return torch.bincount(ids @ torch.tensor([16, 4, 1]), minlength=64)


TINY = TinyRuns()
TINY_SOURCES = {
    **sources(TINY.model, TINY.small),
    "medusa": MedusaDrafts(heads_for(TINY.model, 2)),
    "medusa tree": MedusaDrafts(
        heads_for(TINY.model, 2), DraftTree.from_paths([[0], [1], [2], [0, 0], [0, 1], [1, 0]])
    ),
    "recycling tree": TokenRecycling(candidates=3, tree=DraftTree.from_paths([[0], [1], [0, 0], [0, 1], [1, 0]])),
}
SAMPLERS = [Sampler(), Sampler(temperature=0.7), Sampler(top_k=3), Sampler(top_p=0.8), Sampler(1.3, 3, 0.9)]


@pytest.mark.parametrize("name", TINY_SOURCES)
@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_the_distribution_is_that_of_plain_sampling(name: str, sampler: Sampler) -> None:
    runs, guidance = 2500, Guidance(1.5)
    expected = TINY.probabilities(sampler, guidance) * runs
    verifiers = [Verifier(), GroupedVerifier(p_threshold=0.0), RelaxedVerifier(delta=0.0, table="embedding")]
    for verifier in verifiers if sampler == SAMPLERS[0] else verifiers[:1]:
        counts = TINY.counts(TINY_SOURCES[name], verifier, sampler, guidance, runs)
        assert int(counts[expected == 0].sum()) == 0
        frequent = expected >= 5
        rest = torch.stack([counts[~frequent].sum(), expected[~frequent].sum()])
        seen, wanted = counts[frequent].float(), expected[frequent]
        statistic = float(((seen - wanted) ** 2 / wanted).sum())
        if float(rest[1]) >= 5:
            statistic += float((rest[0] - rest[1]) ** 2 / rest[1])
        freedom = int(frequent.sum())
        # 5 standard deviations of a chi-square variable
        assert statistic < freedom + 5 * (2 * freedom) ** 0.5, (name, statistic, freedom)


def test_loosened_verification_is_not_exact() -> None:
    """The test above can fail."""
    expected = TINY.probabilities(SAMPLERS[0], Guidance(1.5)) * 4000
    for verifier in (RelaxedVerifier(delta=0.5, table="embedding"), TypicalVerifier()):
        counts = TINY.counts(JacobiWindow(3), verifier, SAMPLERS[0], Guidance(1.5), 4000)
        # 63 are expected, and the exact ones stay below 63 + 5 * sqrt(126)
        assert float(((counts - expected) ** 2 / expected).sum()) > 150


# ------------------------------------------------------------------ rows, roll-back, other pipelines


@pytest.mark.parametrize(
    "verifier", [Verifier(), GroupedVerifier(), RelaxedVerifier(delta=0.3)], ids=lambda v: type(v).__name__
)
@pytest.mark.parametrize(
    "name", ["jacobi random", "jacobi repeat_above", "jacobi coupled", "recycling tree", "medusa", "draft model"]
)
def test_a_row_does_not_depend_on_its_batch(name: str, verifier: Verifier) -> None:
    acceleration = armm.Speculative(SOURCES[name], verifier)
    batch = draw(acceleration, generator=generators(3))
    for row, label in list(enumerate(LABELS))[1:]:
        alone = draw(acceleration, labels=[label], generator=[generators(3)[row]])
        assert torch.equal(alone[0], batch[row])


def test_finished_rows_leave_the_batch() -> None:
    """A row that is done is not fed again: the trunk sees as many rows as are running."""
    sizes = []
    trunk = PIPE.transformer.trunk
    handle = trunk.register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    try:
        PIPE.enable_acceleration(armm.RelaxedSpeculative(6, delta=0.4))
        PIPE(class_labels=LABELS, output_type="latent", generator=generators(3), guidance_scale=1.0)
    finally:
        handle.remove()
    assert sizes[0] == 3 and sizes == sorted(sizes, reverse=True) and sizes[-1] < 3


@pytest.mark.parametrize(
    "verifier",
    [Verifier(), GroupedVerifier(3, vectors=torch.eye(6)), RelaxedVerifier(0.3, 3, vectors=torch.eye(6))],
    ids=lambda v: type(v).__name__,
)
def test_coupled_redraws(verifier: Verifier) -> None:
    """They are draws from the new distribution whatever the verifier, and stay what they were with probability 1 - (total variation)."""
    generator, rows, slots, codes = torch.Generator().manual_seed(5), 20000, 1, 6
    p, q = (torch.randn(3, slots, codes, generator=generator).mul(1.5).softmax(-1) for _ in range(2))
    drafts = torch.stack(
        [torch.multinomial(q[place, 0], rows, True, generator=generator) for place in range(2)], dim=1
    )[..., None]
    numbers = [torch.rand(rows, 3, slots, dtype=torch.float64, generator=generator) for _ in range(3)]
    residual = torch.rand(rows, slots, dtype=torch.float64, generator=generator)
    draft = Draft(drafts, q[:2].expand(rows, -1, -1, -1))
    logits = p.log().expand(rows, -1, -1, -1)
    evidence = Evidence(logits, draft, [3] * rows, Numbers(*numbers, residual), all_draws=True, coupled=True)
    verdict = verifier(evidence)
    for place in range(3):
        share = torch.bincount(verdict.draws[:, place, 0], minlength=codes) / rows
        assert torch.allclose(share, p[place, 0], atol=0.015)
    same = (verdict.draws[:, :2, 0] == drafts[..., 0]).float().mean(0)
    assert torch.allclose(same, torch.minimum(p[:2, 0], q[:2, 0]).sum(-1), atol=0.015)
    # what follows the taken drafts is neither of them
    stopped = verdict.accepted < 2
    place = verdict.accepted[stopped]
    assert not bool((verdict.next[stopped, 0] == drafts[stopped][torch.arange(len(place)), place, 0]).any())
    if type(verifier) is Verifier:
        rows_ = torch.arange(rows)
        assert torch.equal(verdict.next[:, 0], verdict.draws[rows_, verdict.accepted, 0])


@pytest.mark.parametrize("padded", [False, True])
def test_masks_of_level_windows(padded: bool) -> None:
    """The mask that moves along with the window is the one made anew, also after a step back and for other lengths."""
    model = PIPE.transformer
    prefix = model.condition(torch.tensor([1, 2]))
    prefix = replace(
        prefix, embeds=prefix.embeds.expand(-1, 3, -1), mask=torch.tensor([[not padded, True, True], [True] * 3])
    )
    table = model.positions_for(model.image_index((4, 4), torch.device("cpu")), (4, 4))
    stream = WindowStream(model, prefix, table[:3], table, spare=6)
    embeds = torch.zeros(2, 1, model.trunk.dim)
    for cached, count in ((0, 4), (2, 4), (6, 4), (3, 4), (9, 4), (10, 2), (11, 2), (11, 4)):
        stream.start = stream.length + cached
        mask = stream._chain_mask(count, embeds)
        wanted = stream._mask([cached] * 2, count, None, torch.device("cpu"))
        assert torch.equal((mask == 0).expand_as(wanted), wanted) and bool(
            ((mask == 0) | (mask == float("-inf"))).all()
        )


def test_a_perfect_drafter_needs_few_calls() -> None:
    acceleration = armm.Speculative(DraftModel(PIPE.transformer, 5))
    draw(acceleration, generator=generators(3))
    statistics = acceleration.statistics
    assert statistics.calls == 1 + 3 and statistics.acceptance_rate == 1.0
    assert statistics.mean_accepted_length == 5.0 and statistics.reduction == 4.0


def test_statistics_and_heat_map() -> None:
    acceleration = armm.JacobiSpeculative(5)
    draw(acceleration, generator=generators(3))
    statistics = acceleration.statistics
    assert statistics.committed == 3 * 15 and 1 <= statistics.calls <= 16
    assert (statistics.taken <= statistics.tested).all() and int(statistics.tested[0]) == 0
    rate = statistics.acceptance_map()
    assert rate.shape == (4, 4) and bool(rate[0, 0].isnan())
    picture = statistics.heat_map(3)
    assert picture.size == (12, 12) and picture.getpixel((0, 0)) == (128, 128, 128)
    assert set(statistics.summary()) == {"calls", "reduction", "mean_accepted_length", "acceptance_rate"}


@pytest.mark.parametrize(
    "source",
    [JacobiWindow(5), JacobiWindow(5, redraw="coupled"), TokenRecycling(tree=TREE)],
    ids=["chain", "coupled", "tree"],
)
def test_given_codes_stay(source: object) -> None:
    latents = draw(None, generator=generators(3))
    latents[:, 5:9] = -1
    kept = latents >= 0
    drawn = draw(armm.Speculative(source), latents=latents, generator=generators(3))
    assert torch.equal(drawn[kept], latents[kept])
    plain = draw(None, latents=latents, do_sample=False)
    assert torch.equal(draw(armm.Speculative(source), latents=latents, do_sample=False), plain)


def test_callbacks_see_and_stop() -> None:
    PIPE.enable_acceleration(armm.JacobiSpeculative(5))
    seen = []

    def stop(pipe, step, timestep, tensors):
        seen.append(tensors["latents"].clone())
        if step == 2:
            pipe._interrupt = True
        return {}

    PIPE(class_labels=LABELS, output_type="latent", callback_on_step_end=stop)
    assert len(seen) == 3 and all(ids.shape == (3, 16) for ids in seen)
    assert bool((seen[0][:, 0] >= 0).all()) and bool((seen[0][:, 1:] == -1).all())


def test_guidance_for_a_while() -> None:
    settings = {"do_sample": False, "guidance_interval": 5}
    assert torch.equal(draw(armm.JacobiSpeculative(4), **settings), draw(None, **settings))


def test_unified_model() -> None:
    pipe = unified_pipeline()
    prompts = ["a red sphere", "a large blue cube to the left of a small green cone"]
    plain = pipe(prompts, generator=generators(2), output_type="latent").images
    pipe.enable_acceleration(armm.JacobiSpeculative(6, rule="match"))
    assert torch.equal(pipe(prompts, generator=generators(2), output_type="latent").images, plain)
    pipe.enable_acceleration(armm.Speculative(DraftModel(pipe.transformer, 4)))
    pipe(prompts, generator=generators(2), output_type="latent")
    assert pipe.acceleration.statistics.acceptance_rate == 1.0
    for acceleration in (armm.GroupedSpeculative(6), armm.RelaxedSpeculative(6)):
        pipe.enable_acceleration(acceleration)
        assert len(pipe(prompts, generator=generators(2)).images) == 2
    pipe.disable_acceleration()
    assert torch.equal(pipe(prompts, generator=generators(2), output_type="latent").images, plain)


def test_token_shuffle_accepts_by_fused_token() -> None:
    torch.manual_seed(2)
    trunk = {"dim": 32, "num_layers": 2, "num_heads": 2, "mlp_hidden": 48, "rotary_axes": [8, 8]}
    condition = {"type": "class", "num_classes": 10}
    model = AutoregressiveModel(
        vocab_size=6, transformer=trunk, condition=condition, grid=(4, 4), shuffle={"window": 2}
    ).eval()
    decoding, labels = TokenShuffleDecoding(2), torch.tensor([1, 2])
    call = {"null_condition": model.null_condition(2), "guidance": Guidance(2.0)}
    for source in (JacobiWindow(3), JacobiWindow(3, redraw="coupled"), DraftModel(model, 3)):
        exact, match = (SpeculativeDecoding(decoding, source, verifier) for verifier in (Verifier(), MatchVerifier()))
        greedy = Sampler(do_sample=False)
        plain = decoding(model, model.condition(labels), sampler=greedy, **call).ids
        assert torch.equal(
            exact(model, model.condition(labels), sampler=greedy, noise=generators(2), **call).ids, plain
        )
        plain = decoding(model, model.condition(labels), noise=generators(2), **call).ids
        assert torch.equal(match(model, model.condition(labels), noise=generators(2), **call).ids, plain)
        assert match.statistics.units == 4 and match.statistics.acceptance_map().shape == (4, 4)
    assert exact.statistics.calls <= 4
    perfect = SpeculativeDecoding(decoding, DraftModel(model, 4), Verifier())
    perfect(
        model,
        model.condition(labels),
        noise=generators(2),
        guidance=Guidance(2.0),
        null_condition=model.null_condition(2),
    )
    assert perfect.statistics.calls == 2 and perfect.statistics.acceptance_rate == 1.0


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize("make, told", [
    (lambda: armm.JacobiSpeculative(0), "window must be an integer >= 1"),
    (lambda: armm.JacobiSpeculative(2.5), "window must be an integer >= 1"),
    (lambda: armm.JacobiSpeculative(init="zeros"), "init must be one of"),
    (lambda: armm.JacobiSpeculative(rule="guess"), "rule must be one of"),
    (lambda: armm.GroupedSpeculative(redraw="never"), "redraw must be one of"),
    (lambda: armm.GroupedSpeculative(window=-1), "window must be"),
    (lambda: armm.GroupedSpeculative(group_size=-2), "group_size must be an integer >= 0"),
    (lambda: armm.GroupedSpeculative(p_threshold=-0.1), "p_threshold must be >= 0"),
    (lambda: armm.GroupedSpeculative(distance_threshold=float("nan")), "distance_threshold must be >= 0"),
    (lambda: armm.GroupedSpeculative(table="pixels"), "table must be one of"),
    (lambda: armm.RelaxedSpeculative(delta=-0.1), "delta must lie in 0 .. 1"),
    (lambda: armm.RelaxedSpeculative(delta=1.5), "bound='relative'"),
    (lambda: armm.RelaxedSpeculative(neighbours=0), "neighbours must be"),
    (lambda: armm.RelaxedSpeculative(bound="none"), "bound must be one of"),
    (lambda: TokenRecycling(0), "window must be"),
    (lambda: TokenRecycling(candidates=2, tree=TREE), "candidate 2 of 2"),
    (lambda: DraftTree.from_paths([[0, 0]]), "is missing"),
    (lambda: TypicalVerifier(epsilon=-1), "epsilon must be >= 0"),
    (lambda: MedusaDrafts(MedusaHeads(8, 8, 2), TREE), "3 deep, there are 2 heads"),
    (lambda: JacobiWindow(interval=(5, 2)), "interval must be"),
])  # fmt: skip
def test_bad_settings(make, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make()


def test_what_cannot_be_accelerated() -> None:
    from armm.decoding.masked_tokens import MaskedTokenDecoding

    with pytest.raises(ValueError, match="drawn one after the other.*MaskedTokenDecoding"):
        SpeculativeDecoding(MaskedTokenDecoding(), JacobiWindow(), Verifier())
    with pytest.raises(ValueError, match="does not fit"):
        other = AutoregressiveModel(
            vocab_size=12, transformer={"dim": 16, "num_heads": 1, "num_layers": 1}, text_slots=2
        )
        PIPE.enable_acceleration(armm.Speculative(DraftModel(other)))
    with pytest.raises(ValueError, match="heads of 48 tokens on states of 8"):
        PIPE.enable_acceleration(armm.Speculative(MedusaDrafts(MedusaHeads(8, 48))))
    with pytest.raises(TypeError, match="draft must be a draft source"):
        armm.Speculative("jacobi")
    with pytest.raises(ValueError, match="rule 'match' only"):
        draw(armm.JacobiSpeculative(4), noise=torch.ones(3, 16, 48))
    model = tiny_transformer({"type": "class", "num_classes": 10})
    decoding = SpeculativeDecoding(TokenShuffleDecoding(2), JacobiWindow(), Verifier())
    with pytest.raises(ValueError, match="do not belong together"):
        decoding(model, model.condition(torch.tensor([1])))


def test_a_continuous_pipeline_says_what_it_supports() -> None:
    pipe = armm.VARPipeline
    assert not issubclass(pipe, armm.LlamaGenPipeline) and armm.Speculative not in pipe._accelerations
    from tiny_var import tiny_pipeline as var_pipeline

    with pytest.raises(ValueError, match="cannot be accelerated with JacobiSpeculative"):
        var_pipeline().enable_acceleration(armm.JacobiSpeculative())
