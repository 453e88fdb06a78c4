"""Phase 2's values that contradict each other, and those without effect."""

from __future__ import annotations

from lgpt.settings.data import DataSettings
from lgpt.settings.phases import Phase2
from lgpt.settings.problems import AddInert, At, Problem, neighbours, problem
from lgpt.settings.vqvae import VqvaeSettings

_LEAST_SIDE_FOR_VGG16 = 16


def add_inert_of_phase2(run: Phase2, add: AddInert) -> None:
    """Settings of phase 2 that nothing reads because of another one."""
    if run.init_from is None:
        add("finetuning", "init_from", "without init_from (from scratch)")
    elif run.finetuning.source != "pretrained_taming":
        source = f"with finetuning.source: {run.finetuning.source}"
        add("finetuning.ddconfig", "finetuning.source", source)
    ema_only = "vqvae.ema_decay vqvae.revive_dead_codes"
    if run.finetuning.trains == "decoder":
        codes_only = f"vqvae.codebook_update {ema_only}"
        latent_only = "codebook_weight commitment_weight entropy_weight entropy_temperature"
        names = " ".join([codes_only, *(f"loss.{name}" for name in latent_only.split())])
        add(names, "finetuning.trains", "with finetuning.trains: decoder (codes stay)")
    elif run.vqvae.codebook_update == "gradient":
        add(ema_only, "vqvae.codebook_update", "with codebook_update: gradient (only with ema)")
    else:
        add("loss.codebook_weight", "vqvae.codebook_update", "with codebook_update: ema")
    if run.loss.entropy_weight == 0:
        add("loss.entropy_temperature", "loss.entropy_weight", "with loss.entropy_weight: 0")
    if run.loss.perceptual == "none":
        add("loss.perceptual_weight", "loss.perceptual", "with loss.perceptual: none")
        if run.metrics.lpips == "none":
            weights = "loss.vgg16_weights loss.lpips_weights"
            add(weights, "loss.perceptual", "with loss.perceptual: none and metrics.lpips: none")
    if run.metrics.rfid == "none":
        add("metrics.inception_weights", "metrics.rfid", "with metrics.rfid: none")
    if run.loss.adversarial == "none":
        add("discriminator", "loss.adversarial", "with loss.adversarial: none (only with hinge)")
    _add_inert_health(run, add)


def _add_inert_health(run: Phase2, add: AddInert) -> None:
    codes, player = "health.least_codebook_usage", "health.least_discriminator_loss"
    learns_codes, has_player = run.finetuning.trains == "all", run.loss.adversarial != "none"
    if not learns_codes:
        names = f"health.codebook_window_tokens {codes}"
        add(names, "finetuning.trains", "with finetuning.trains: decoder (codes stay)")
    elif run.health.least_codebook_usage == 0:
        add("health.codebook_window_tokens", codes, f"with {codes}: 0 (usage is not judged)")
    if not has_player:
        names = f"health.discriminator_window_steps {player}"
        add(names, "loss.adversarial", "with loss.adversarial: none (only with hinge)")
    elif run.health.least_discriminator_loss == 0:
        add("health.discriminator_window_steps", player, f"with {player}: 0 (it is not judged)")
    judges_codes = learns_codes and run.health.least_codebook_usage > 0
    judges_player = has_player and run.health.least_discriminator_loss > 0
    if not (judges_codes or judges_player):
        switch = codes if learns_codes else "finetuning.trains"
        add("health.respond", switch, "where neither codes nor discriminator are judged")


def contradictions_of_phase2(run: Phase2, at: At) -> list[Problem]:
    """Settings of phase 2 that cannot both be meant."""
    problems = [*_vqvae(run.vqvae, run.data, at), *_perceptual(run, at), *_discriminator(run, at)]
    return [*problems, *_codes(run, at), *_health(run, at)]


def _codes(run: Phase2, at: At) -> list[Problem]:
    """The straight-through step gives codes no gradient of the pictures."""
    loss = run.loss
    has_teacher = loss.codebook_weight > 0 or loss.entropy_weight > 0
    is_learnt = run.finetuning.trains == "all" and run.vqvae.codebook_update == "gradient"
    if has_teacher or not is_learnt:
        return []
    names = ("loss.codebook_weight", "vqvae.codebook_update")
    text = (
        f"{at(names[0])} leaves the codes where they began: with {at(names[1])} only this loss "
        "moves them; set it to 1.0, or vqvae.codebook_update to ema."
    )
    return [problem(text, *names)]


def _vqvae(vqvae: VqvaeSettings, data: DataSettings, at: At) -> list[Problem]:
    problems = []
    factor = vqvae.downsample_factor
    for name, side in (
        ("data.resolution", data.resolution),
        ("vqvae.resolution", vqvae.resolution),
    ):
        if side % factor:
            text = (
                f"{at(name)} must be a multiple of the downsample factor {factor} that "
                f"{at('vqvae.ch_mult')} gives; {neighbours(side, factor)}."
            )
            problems.append(problem(text, name, "vqvae.ch_mult"))
    sides = [vqvae.resolution // 2**level for level in range(len(vqvae.ch_mult))]
    strangers = [side for side in vqvae.attn_resolutions if side not in sides]
    if strangers and not vqvae.resolution % factor:
        text = (
            f"{at('vqvae.attn_resolutions')} names {', '.join(map(str, strangers))}, which no "
            "level has: "
            f"{at('vqvae.resolution')} halves to {', '.join(map(str, sides))}; use some of these "
            "or []."
        )
        names = ("vqvae.attn_resolutions", "vqvae.resolution", "vqvae.ch_mult")
        problems.append(problem(text, *names))
    if vqvae.num_res_blocks == 0 and any(multiple > 1 for multiple in vqvae.ch_mult):
        both = ("vqvae.num_res_blocks", "vqvae.ch_mult")
        text = (
            f"{at(both[0])} leaves the encoder nothing that changes its width, but "
            f"{at(both[1])}; set num_res_blocks to 1 or more, or ch_mult to "
            f"{[1] * len(vqvae.ch_mult)} (and ch wider)."
        )
        problems.append(problem(text, *both))
    if any(multiple < 1 for multiple in vqvae.ch_mult):
        text = f"{at('vqvae.ch_mult')} must hold whole numbers of at least 1."
        problems.append(problem(text, "vqvae.ch_mult"))
    return problems


def _perceptual(run: Phase2, at: At) -> list[Problem]:
    if run.loss.perceptual == "none" or run.data.resolution >= _LEAST_SIDE_FOR_VGG16:
        return []
    names = ("loss.perceptual", "data.resolution")
    text = (
        f"{at(names[0])} halves pictures four times, {at(names[1])} is too small for it; take "
        f"{_LEAST_SIDE_FOR_VGG16} or more, or perceptual: none."
    )
    return [problem(text, *names)]


def _discriminator(run: Phase2, at: At) -> list[Problem]:
    if run.loss.adversarial == "none":
        return []
    problems = []
    settings, start = run.discriminator, "discriminator.start_step"
    if settings.start_step >= run.training.max_steps:
        names = (start, "training.max_steps")
        text = (
            f"{at(start)} must be less than {at(names[1])}: the discriminator would never count; "
            f"set it to {run.training.max_steps // 5} or so, or loss.adversarial to none."
        )
        problems.append(problem(text, *names))
    if settings.warmup_steps > settings.start_step:
        names = ("discriminator.warmup_steps", start)
        text = (
            f"{at(names[0])} must be at most {at(start)}: it learns before it counts; set it to "
            f"{settings.start_step}."
        )
        problems.append(problem(text, *names))
    least = 3 * 2**settings.layers
    if run.data.resolution < least:
        names = ("discriminator.layers", "data.resolution")
        text = (
            f"{at(names[0])} leaves nothing of {at(names[1])}: pictures must have at least {least} "
            "pixels a side for it; lower it."
        )
        problems.append(problem(text, *names))
    return problems


def _health(run: Phase2, at: At) -> list[Problem]:
    names = ("health.codebook_window_tokens", "vqvae.codebook_size")
    wants_judged = run.finetuning.trains == "all" and run.health.least_codebook_usage > 0
    if not wants_judged or run.health.codebook_window_tokens >= run.vqvae.codebook_size:
        return []
    text = (
        f"{at(names[0])} must be at least {at(names[1])}, or some codes would be unused in every "
        f"window; set it to {4 * run.vqvae.codebook_size} or so."
    )
    return [problem(text, *names)]
