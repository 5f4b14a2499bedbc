"""FedVTC as a whole: what crosses the wire, what each phase may change, what becomes of classes nobody has, and that every setting does something."""
import functools

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

from hpcfl import tree
from hpcfl.algorithms.fedvtc import Config, FedVTC, FineTune
from hpcfl.contract import ClientSite
from hpcfl.data.partition import Partition
from hpcfl.errors import JobError
from hpcfl.federation.world import World
from hpcfl.generators.vtc import VTC
from hpcfl.latents.matching import MATCHINGS
from hpcfl.latents.moments import MODES, unpack_triangle
from hpcfl.runs.choices import CHOICES
from hpcfl.settings import annotations
from hpcfl.settings.fields import Setting
from hpcfl.training.evaluate import bind_model, count_correct
from hpcfl.training.group import Group
from hpcfl.training.turns import Modules
from hpcfl.wire.uplink import Sums, Uploads
from tests.support.in_memory import Run, bits, changed, finite, job, run, step, world

QUICK = {"per_class": 3, "finetune_epochs": 2, "dm_classes": 4, "dm_samples": 4}
CLASSES, SIZE, CLIENTS = 10, 6, 3                                  # of the small job
PSI_BYTES = 4 * sum(parameter.numel() for parameter in VTC(SIZE, (1, 8, 8)).parameters())
TRIANGLE = SIZE * (SIZE + 1) // 2
SPREAD = {"shared_diag": SIZE, "class_diag": CLASSES * SIZE, "class_iso": CLASSES, "shared_full": TRIANGLE, "class_full": CLASSES * TRIANGLE}


def described(settings=None, **sections):
    return job("fedvtc", QUICK | (settings or {}), **sections)


def went(settings=None, **sections) -> Run:
    return run(world(described(settings, **sections)))


def baseline(**settings) -> Run:
    """A run that tests share; they must not change it."""
    defaults = vars(Config()) | QUICK
    return _baseline(tuple(sorted((name, value) for name, value in settings.items() if value != defaults[name])))


@functools.cache
def _baseline(settings) -> Run:
    return went(dict(settings))


class Inside:
    """One client's round from the inside: a step of the plan, a group and its site, and what the server knows after some rounds."""

    def __init__(self, found: Run, kind: type, position: int = 1, architecture: str = "cnn1") -> None:
        self.world, self.step = found.world, step(found.world, kind)
        phase = next(phase for phase in self.world.plan if self.step in phase.steps)
        self.group = next(group for group in found.states[position].groups if group.architecture == architecture)
        self.site = self.world.client_site(self.group, phase, position)
        self.message = self.step.publish(found.states[position].server)
        self.read_gaussians = self.step.read_gaussians(self.message)

    def vtc_phase(self) -> tuple[Group, dict[str, torch.Tensor]]:
        latents = self.step.encode(self.group, self.site)
        return self.step.train_generator(self.group, latents, self.step.measure(latents, self.site), self.read_gaussians, self.site)

    def batch(self, client: int) -> dict[str, torch.Tensor]:
        """The first batch of the VTC phase."""
        latents = self.step.encode(self.group, self.site)
        deviation = self.step.deviation(self.step.measure(latents, self.site)[client])
        return next(self.step.generator_batches(client, latents[client], deviation, self.read_gaussians, self.site))

    def marks(self) -> list:
        """What a phase must leave as it found it on the modules themselves: flags, gradients and weights."""
        parameters = [(path, p.requires_grad, p.grad is None) for name in self.site.modules for path, p in self.site.modules[name].named_parameters()]
        flags = [module.training for name in self.site.modules for module in self.site.modules[name].modules()]
        return [parameters, flags, [bits(self.site.modules[name].state_dict()) for name in self.site.modules]]


# What crosses the wire


def message_bytes(mode: str) -> tuple[int, int]:
    """B_up and B_down without psi (specification, 2.5)."""
    payload = 4 * (CLASSES * SIZE + SPREAD[mode])
    return 16 + 8 * CLASSES + payload, 16 + CLASSES + payload


def booked(found: Run, direction: str) -> list[int]:
    """Bytes of each client, the same for all, in each round."""
    rounds = [[account[direction].get(client, 0) for client in range(CLIENTS)] for account in found.accounts]
    assert all(len(set(row)) == 1 for row in rounds), f"clients of one round differ: {rounds}"
    return [row[0] for row in rounds]


@pytest.mark.parametrize("sync", ["fedavg", "none"])
@pytest.mark.parametrize("mode", MODES)
def test_counted_bytes_are_those_of_the_formula_in_every_round(mode, sync):
    found, psi = baseline(covariance=mode, vtc_sync=sync), PSI_BYTES if sync == "fedavg" else 0
    up, down = message_bytes(mode)
    assert [(place.phase.name, place.round) for place in found.places] == [("rounds", 0), ("rounds", 1), ("rounds", 2), ("finetune", 0)]
    assert booked(found, "up") == [up, up + psi, up + psi, 0]      # no psi is trained before there are global statistics
    assert booked(found, "down") == [down, down, down + psi, down + psi]       # the last one is the final message


def test_psi_travels_every_so_many_rounds_and_after_the_last():
    found, (up, down) = went({"vtc_sync_every": 2}, federation={"clients": 3, "rounds": 5}), message_bytes("shared_diag")
    assert booked(found, "up") == [up, up + PSI_BYTES, up, up + PSI_BYTES, up + PSI_BYTES, 0]
    assert booked(found, "down") == [down, down, down + PSI_BYTES, down, down + PSI_BYTES, down + PSI_BYTES]


def test_fine_tuning_in_every_round_downloads_each_message_once():
    found, (up, down) = baseline(finetune="every_round"), message_bytes("shared_diag")
    assert booked(found, "up") == [up, up + PSI_BYTES, up + PSI_BYTES]
    assert booked(found, "down") == [down + down, down + PSI_BYTES, down + PSI_BYTES]    # the empty statistics, then what came of each round


@pytest.mark.parametrize("mode", MODES)
def test_the_form_by_sums_sends_float64_sums_and_tells_the_means_between_its_phases(mode):
    found, (_, down) = baseline(covariance=mode, statistics="sums"), message_bytes(mode)
    up = 8 * (CLASSES + CLASSES * SIZE + SPREAD[mode])
    assert booked(found, "up") == [up, up + PSI_BYTES, up + PSI_BYTES, 0]
    assert booked(found, "down") == [down + 4 * CLASSES * SIZE + psi for psi in (0, 0, PSI_BYTES)] + [down + PSI_BYTES]


def test_common_latents_are_described_once_and_cost_nothing_per_round_without_psi():
    found = baseline(latent="common", common_size=SIZE, vtc_sync="none")
    up, down = message_bytes("shared_diag")
    assert [place.phase.name for place in found.places] == ["statistics", "rounds", "rounds", "rounds", "finetune"]
    assert booked(found, "up") == [up, 0, 0, 0, 0]
    assert booked(found, "down") == [0, down, 0, 0, 0]


def test_only_the_cohort_pays_and_the_last_message_goes_to_all():
    found, (up, down) = went(federation={"clients": 3, "rounds": 3, "participation": 0.4}), message_bytes("shared_diag")
    for place, account in zip(found.places[:-1], found.accounts, strict=False):
        cohort = set(found.world.cohort(place.phase, place.row))
        assert len(cohort) == 1 and account["up"].keys() == account["down"].keys() == cohort
    assert found.accounts[-1]["up"] == {} and set(found.accounts[-1]["down"]) == {0, 1, 2}
    sent = sum(sum(account[way].values()) for account in found.accounts for way in ("up", "down"))
    assert sent == 3 * (up + down) + 2 * PSI_BYTES + PSI_BYTES + CLIENTS * (down + PSI_BYTES)


class Overheard:
    """What ranks brought to each combination."""

    def __init__(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        self.statistics = []
        combine = world.comm.combine
        monkeypatch.setattr(world.comm, "combine", lambda statistics: [self.statistics.append(statistics), combine(statistics)][1])

    def parts(self) -> list:
        return [part for statistics in self.statistics for part in statistics.pieces.values()]


@pytest.mark.parametrize("latent", ["own", "common"])
def test_by_sums_the_server_never_sees_one_clients_statistics(latent, monkeypatch):
    followed = world(described({"statistics": "sums", "latent": latent, "common_size": SIZE}))
    overheard = Overheard(followed, monkeypatch)
    assert finite(run(followed).states[-1].server)
    assert overheard.parts() and all(isinstance(part, Sums) for part in overheard.parts())


def test_no_class_below_the_minimum_count_is_uploaded(monkeypatch):
    followed = world(described({"min_count": 5}))
    overheard = Overheard(followed, monkeypatch)
    run(followed)
    uploads = [upload for part in overheard.parts() if isinstance(part, Uploads) for upload in part.trees.values()]
    rare = [bool((upload["counts"] == 0).any()) for upload in uploads]
    assert all(int(upload["counts"][upload["counts"] > 0].min()) >= 5 for upload in uploads) and any(rare)
    assert all(not upload["means"][upload["counts"] == 0].any() for upload in uploads)


# Statistics


@pytest.mark.parametrize("min_count", [1, 5])
@pytest.mark.parametrize("mode", MODES)
def test_sums_give_the_statistics_of_uploads(mode, min_count):
    one, other = (baseline(covariance=mode, statistics=form, min_count=min_count).states[1].server for form in ("sums", "uploads"))
    assert torch.equal(one["has"], other["has"]) and torch.equal(one["count"], other["count"])
    for name in ("mean", "spread"):                                # uploads are cast to float32
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_sums_give_the_statistics_of_uploads_of_common_latents_too(mode):
    one, other = (baseline(covariance=mode, statistics=form, latent="common", common_size=SIZE).states[-1].server for form in ("sums", "uploads"))
    for name in ("mean", "spread", "count"):
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)


def test_sums_cannot_leave_out_the_spread_between_clients():
    with pytest.raises(JobError, match="between_client"):
        world(described({"statistics": "sums", "between_client": False}))


def test_the_same_seed_gives_the_same_bits_and_another_seed_others():
    one, other, third = (went(run={"device": "cpu", "seed": seed}) for seed in (4, 4, 5))
    assert bits(one.states[-1].server) == bits(other.states[-1].server)
    assert all(bits(one.state(client)) == bits(other.state(client)) for client in range(CLIENTS))
    assert bits(one.states[1].server)["mean"] != bits(third.states[1].server)["mean"]


@pytest.mark.parametrize("sigma", ["empirical", "learnable"])
@pytest.mark.parametrize("mode", MODES)
def test_the_divergence_of_the_loss_is_the_one_of_torch_distributions(mode, sigma):
    inside = Inside(baseline(covariance=mode, sigma_source=sigma, vtc_batch=1000), FedVTC)
    client, known = inside.group.clients[0], inside.read_gaussians
    z, y = inside.step.encode(inside.group, inside.site)[client].double(), inside.site.holdings[client].train.labels
    deviation = inside.step.deviation(inside.step.measure({client: z}, inside.site)[client]).double()
    spread, kind = inside.message["spread"].double(), MODES[mode]
    if kind.full:
        matrices = unpack_triangle(spread).expand(CLASSES, SIZE, SIZE)
    else:
        matrices = torch.diag_embed((spread[:, None] if kind.isotropic else spread).expand(CLASSES, SIZE))
    want = kl_divergence(MultivariateNormal(z, torch.diag_embed(deviation[y].square())), MultivariateNormal(known.mean[y].double(), matrices[y]))
    _, metrics = inside.vtc_phase()
    assert float(metrics["kl"][0]) == pytest.approx(float(want.mean()), rel=1e-5)


def test_a_learnable_deviation_starts_from_the_empirical_one_and_moves():
    one, other = (Inside(baseline(sigma_source=sigma, vtc_batch=1000, vtc_lr=1e-12, sigma_lr=1e-2), FedVTC) for sigma in ("empirical", "learnable"))
    assert one.vtc_phase()[1]["reconstruction"].item() == other.vtc_phase()[1]["reconstruction"].item()
    assert "deviation/log_ratio" in changed(other.group.state, other.vtc_phase()[0].state)


# What each phase may change


@pytest.mark.parametrize("architecture", ["mlp2", "cnn1"])
@pytest.mark.parametrize("settings, allowed", [({}, {"generator"}), ({"vtc_sync": "none"}, {"generator", "optimizer"}),
                                               ({"sigma_source": "learnable"}, {"generator", "deviation"}), ({"latent": "common"}, {"generator"})])
def test_the_vtc_phase_changes_psi_only(settings, allowed, architecture):
    inside = Inside(baseline(**settings), FedVTC, architecture=architecture)
    before = inside.marks()
    group, _ = inside.vtc_phase()
    found = changed(inside.group.state, group.state)
    assert {path.split("/")[0] for path in found} == allowed
    assert {"generator/start", "generator/layers"} <= found
    assert inside.marks() == before


def test_f_k_is_as_before_and_trainable_after_an_exception_in_the_vtc_phase(monkeypatch):
    inside = Inside(baseline(), FedVTC)
    before, state, calls = inside.marks(), bits(inside.group.state), []

    def fails(modules, images):
        calls.append(modules.model.training)
        raise ArithmeticError("in the middle")
    monkeypatch.setattr(type(inside.step.latent), "encode", staticmethod(fails))
    with pytest.raises(ArithmeticError):
        inside.vtc_phase()
    assert calls == [False]                                        # f_k is in eval mode there
    assert inside.marks() == before and bits(inside.group.state) == state
    assert all(parameter.requires_grad for parameter in inside.site.modules["model"].parameters())


def test_round_0_trains_no_vtc_and_aligns_with_nothing():
    found = baseline()
    assert found.accounts[0]["metrics"].keys() == {"loss", "seconds"}
    assert {"reconstruction", "kl", "dm", "vtc_loss", "alignment"} <= found.accounts[1]["metrics"].keys()
    for client in range(CLIENTS):
        assert not any(path.startswith("generator") for path in changed(found.state(client, 0), found.state(client, 1)))


def test_all_clients_start_from_one_psi():
    starts = [tree.part(baseline().state(client, 0), "generator") for client in range(CLIENTS)]
    assert bits(starts[0]) == bits(starts[1]) == bits(starts[2])


@pytest.mark.parametrize("architecture, parts", [("mlp2", {"model/extractor", "model/projection", "model/head"}),
                                                 ("cnn1", {"model/extractor", "model/body", "model/projection", "model/head"})])
def test_fine_tuning_changes_the_whole_classifier_and_not_psi(architecture, parts):
    inside = Inside(baseline(vtc_sync="none"), FineTune, position=3, architecture=architecture)
    before = inside.marks()
    tuned = inside.step.refine(inside.group, inside.message, inside.site).group
    assert changed(inside.group.state, tuned.state) == parts and inside.marks() == before


def test_fine_tuning_adopts_the_psi_of_the_final_message_and_keeps_its_bits():
    inside = Inside(baseline(), FineTune, position=3)
    tuned = inside.step.refine(inside.group, inside.message, inside.site).group
    assert bits(tree.row(tuned.part("generator"), 0)) == bits(tree.part(inside.message, "generator"))


@pytest.mark.parametrize("architecture", ["mlp2", "cnn1"])
def test_fine_tuning_of_the_head_changes_the_head_only(architecture):
    inside = Inside(baseline(vtc_sync="none", finetune_scope="head"), FineTune, position=3, architecture=architecture)
    assert changed(inside.group.state, inside.step.refine(inside.group, inside.message, inside.site).group.state) == {"model/head"}


@pytest.mark.parametrize("norm, moves", [("frozen", False), ("train", True)])
def test_running_statistics_stay_frozen_while_fine_tuning_unless_asked(norm, moves):
    inside = Inside(baseline(vtc_sync="none", ft_norm=norm), FineTune, position=3)
    tuned = inside.step.refine(inside.group, inside.message, inside.site).group
    buffers = [path for path in inside.group.state if "running_mean" in path]
    assert buffers and all(torch.equal(inside.group.state[path], tuned.state[path]) != moves for path in buffers)


def test_heads_start_alike_when_asked():
    heads = [[bits(found.state(client, 0))["model/head.weight"] for client in range(CLIENTS)] for found in (baseline(), baseline(frozen_head_init=True))]
    assert len(set(heads[0])) == CLIENTS and len(set(heads[1])) == 1


@pytest.mark.parametrize("settings", [{}, {"vtc_steps": 3}, {"finetune": "every_round"}], ids=["passes", "steps", "every round"])
def test_the_expected_steps_are_those_of_all_rounds(settings, monkeypatch):
    expected, taken, fit = {}, {}, ClientSite.fit

    def watched(self, group, turns, batches, *, steps=0, **others):
        drawn = dict.fromkeys(group.clients, 0)

        def counted(client):
            for batch in batches(client):
                drawn[client] += 1
                yield batch
        result = fit(self, group, turns, counted, steps=steps, **others)
        work = "fine-tuning" if "frozen_norm" in others else turns[0].trains[0]
        expected[work], taken[work] = steps, max(drawn.values())
        return result
    monkeypatch.setattr(ClientSite, "fit", watched)
    went({"vtc_batch": 7, "vtc_epochs": 2, "finetune_batch": 9} | settings, federation={"clients": 2, "rounds": 3}, models={"names": ["mlp2"]})
    assert expected["generator"] == 3 * taken["generator"] > 0
    assert expected["fine-tuning"] == taken["fine-tuning"] * (3 if settings.get("finetune") == "every_round" else 1) > 0


@pytest.mark.parametrize("weights", ["counts", "uniform"])
def test_psi_is_averaged_by_counts_or_uniformly(weights):
    found = baseline(vtc_weights=weights)
    sizes = [len(found.world.holdings[client].train) for client in range(CLIENTS)]
    shares = np.array(sizes) / sum(sizes) if weights == "counts" else np.full(CLIENTS, 1 / CLIENTS)
    for path, leaf in tree.part(found.states[2].server, "generator").items():
        rows = np.stack([tree.part(found.state(client, 2), "generator")[path].double().numpy() for client in range(CLIENTS)])
        np.testing.assert_allclose(leaf.numpy(), np.tensordot(shares, rows, 1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("settings", [{}, {"statistics": "sums"}, {"latent": "common"}], ids=["uploads", "sums", "common"])
def test_between_two_averages_each_psi_goes_on_from_where_it_was(settings, monkeypatch):
    heard = []
    adopt = FedVTC.adopt
    monkeypatch.setattr(FedVTC, "adopt", lambda self, group, message: [heard.append(bool(tree.part(message, "generator"))), adopt(self, group, message)][1])
    found = went(settings | {"vtc_sync_every": 2, "finetune_epochs": 1}, federation={"clients": 2, "rounds": 6}, models={"names": ["mlp2"]})
    assert heard == [False, False, True, False, True, False], "a round adopts the average of two rounds ago again"
    assert finite(found.states[-1].server)


# Distribution matching


@pytest.mark.parametrize("dm", MATCHINGS)
def test_distribution_matching_moves_psi_and_not_g_k(dm):
    inside = Inside(baseline(dm=dm), FedVTC)
    client, modules = inside.group.clients[0], Modules(inside.site.modules)
    for name in ("model", "generator"):
        inside.site.modules[name].load_state_dict(tree.row(inside.group.part(name), 0))
    context = {"mean": inside.read_gaussians.mean, "variance": inside.read_gaussians.variance, "weight": inside.read_gaussians.weight}
    loss = inside.step.matching(modules.eval(), inside.batch(client), context)
    slopes = torch.autograd.grad(loss, list(inside.site.modules["generator"].parameters()))
    assert bool(loss != 0) and all(bool(slope.any()) and bool(torch.isfinite(slope).all()) for slope in slopes)


@pytest.mark.parametrize("engine", ["sequential", "vmap"])
def test_nothing_of_g_k_is_differentiated_in_the_vtc_phase(engine, monkeypatch):
    inside, seen = Inside(went(training={"batch": 16, "engine": engine}), FedVTC, architecture="mlp2"), set()

    def watched(self, modules, batch, context):
        seen.update((path.split(".")[0], parameter.requires_grad) for path, parameter in modules.named_parameters())
        return loss(self, modules, batch, context)
    loss = FedVTC.generator_loss
    monkeypatch.setattr(FedVTC, "generator_loss", watched)
    inside.vtc_phase()
    frozen = {name for name, slope in seen if not slope}
    assert frozen == {"model"} if engine == "sequential" else "model" in frozen           # vmap hides behind wrappers which leaves are differentiated


def test_distribution_matching_is_zero_where_mean_features_are_the_prototypes():
    inside = Inside(baseline(dm="mean"), FedVTC)
    batch, modules = inside.batch(inside.group.clients[0]), Modules(inside.site.modules).eval()
    with torch.no_grad():
        features = inside.step.latent.encode(modules, modules.generator(batch["v"])).view(len(batch["classes"]), -1, SIZE)
        mean = inside.read_gaussians.mean.index_copy(0, batch["classes"], features.mean(1))
        context = {"mean": mean, "variance": inside.read_gaussians.variance, "weight": inside.read_gaussians.weight}
        assert float(inside.step.matching(modules, batch, context)) == 0
        assert float(inside.step.matching(modules, batch, context | {"mean": mean + 1})) > 1


# Classes that are not everywhere


def without_class(y: int, settings=None, **sections) -> World:
    """The small world with no training image of a class."""
    emptied = world(described(settings, **sections))
    labels = emptied.corpus.train_labels
    emptied.split = Partition(*(tuple(part[labels[part] != y] for part in getattr(emptied.split, name)) for name in ("train", "validation", "test")),
                          emptied.split.public, emptied.split.public_validation)
    return emptied


@pytest.mark.parametrize("settings", [*({"covariance": mode} for mode in MODES), {"statistics": "sums", "covariance": "class_full"}, {"latent": "common"},
                                      {"dm": "mmd_rbf"}, {"sigma_source": "learnable", "covariance": "class_iso"}], ids=str)
def test_a_class_that_nobody_has_is_neither_known_nor_drawn_nor_nan(settings, monkeypatch):
    drawn = []
    generate = FineTune.generate

    def watched(self, *arguments):
        draw = generate(self, *arguments)
        return lambda labels, generator: [drawn.append(labels), draw(labels, generator)][1]
    monkeypatch.setattr(FineTune, "generate", watched)
    found = run(without_class(7, settings))
    server, labels = found.states[-1].server, torch.cat(drawn)
    assert server["has"].tolist() == [y != 7 for y in range(CLASSES)] and not server["mean"][7].any()
    assert torch.bincount(labels, minlength=CLASSES).tolist() == [CLIENTS * QUICK["finetune_epochs"] * QUICK["per_class"] * (y != 7) for y in range(CLASSES)]
    assert finite(server) and all(finite(found.state(client)) for client in range(CLIENTS))
    assert all(np.isfinite(value) for account in found.accounts for values in account["metrics"].values() for value in values.values())


@pytest.mark.parametrize("settings", [*({"covariance": mode} for mode in MODES), {"statistics": "sums", "covariance": "class_full"}], ids=str)
def test_a_class_of_an_earlier_cohort_keeps_its_value(settings):
    found = went(settings, federation={"clients": 3, "rounds": 4, "participation": 0.34}, data={"partition": "disjoint"})
    labels, had = found.world.corpus.train_labels, torch.zeros(CLASSES, dtype=torch.bool)
    kept = 0
    for place, before, after in zip(found.places[:4], found.states, found.states[1:], strict=False):
        (client,) = found.world.cohort(place.phase, place.row)
        held = torch.from_numpy(np.bincount(labels[found.world.split.train[client]], minlength=CLASSES) > 0)
        old = had & ~held
        had, kept = had | held, kept + int(old.sum())
        assert torch.equal(after.server["has"], had)
        assert torch.equal(after.server["mean"][old], before.server["mean"][old]) and bool(after.server["mean"][old].any(1).all())
        if not MODES[settings["covariance"]].shared:
            assert torch.equal(after.server["spread"][old], before.server["spread"][old])
        assert not torch.equal(after.server["mean"][held], before.server["mean"][held])
    assert kept > 0, "every cohort held all classes known before it"


@pytest.mark.parametrize("name", ["fedvtc", "fedproto"])
def test_models_without_a_common_feature_size_are_refused_before_round_0(name):
    with pytest.raises(JobError, match="models.feature_size = 0"):
        refused = world(job(name, models={"feature_size": 0}))
        refused.found()


def test_all_architectures_give_features_of_the_common_size():
    names = ["mlp2", "cnn1", "cnn5", "resnet8"]
    found = world(described(models={"names": names, "feature_size": SIZE}, federation={"clients": 4}))
    sizes = {name: found.modules[name]["model"].eval().features(torch.zeros(1, 1, 8, 8)).shape[1] for name in names}
    inner = {found.modules[name]["model"].head.in_features for name in names}
    assert set(sizes.values()) == inner == {SIZE}


# From end to end


def accuracy_on_absent_classes(found: World, groups) -> dict[int, float]:
    """Per client, the share of right answers on test images of classes of which it has no training image."""
    held = found.split.counts(found.corpus.train_labels, CLASSES) > 0
    images = np.bincount(found.corpus.test_labels, minlength=CLASSES)
    answers = {client: count_correct(bind_model(group, found.modules[group.architecture], client), found.test, CLASSES).numpy()
               for group in groups for client in group.clients}
    return {client: float(right[~held[client]].sum() / images[~held[client]].sum()) for client, right in answers.items() if not held[client].all()}


def test_a_whole_run_stays_finite_and_learns_to_reconstruct():
    followed, before = world(job("fedvtc", {"finetune_epochs": 8, "per_class": 20}, data={"fraction": 0.5, "alpha": 0.1}, models={"feature_size": 16},
                                 federation={"clients": 4, "rounds": 6}, training={"lr": 0.1})), []
    found = run(followed, lambda state, place: before.append(accuracy_on_absent_classes(followed, state.groups)))
    after = accuracy_on_absent_classes(followed, found.states[-1].groups)
    print("accuracy on locally absent classes, before -> after fine-tuning: "
          + ", ".join(f"client {client} {before[-1][client]:.3f} -> {after[client]:.3f}" for client in sorted(after)))
    assert len(before) == 1 and after and before[0].keys() == after.keys()
    assert all(np.isfinite(value) for account in found.accounts for values in account["metrics"].values() for value in values.values())
    assert finite(found.states[-1].server) and all(finite(found.state(client)) for client in range(4))
    for client in range(4):
        assert found.metric("reconstruction", 5)[client] < 0.8 * found.metric("reconstruction", 1)[client]


# Every setting


CONTEXT = {"common_map": {"latent": "common", "common_size": 8}, "common_size": {"latent": "common", "common_size": 8}, "latent": {"common_size": 8},
           "shrink_target": {"covariance": "class_full"}, "sigma_lr": {"sigma_source": "learnable"}, "beta_kl": {"sigma_source": "learnable", "sigma_lr": 1e-2}}
OTHER = {"common_size": 10, "min_count": 4, "alignment": 0.7, "warmup": 0, "vtc_sync_every": 3, "vtc_epochs": 2, "vtc_steps": 5, "vtc_batch": 8,
         "vtc_lr": 1e-2, "vtc_clip": 1e-2, "sigma_lr": 1e-2, "noise": 0.0, "beta_kl": 0.0, "beta_dm": 0.0, "beta_tv": 0.1, "dm_classes": 2, "dm_samples": 3,
         "variance_floor": 0.5, "server_floor": 0.5, "truncate": 0.5, "finetune_epochs": 1, "per_class": 2, "finetune_batch": 7, "finetune_lr": 0.01}
WITHOUT_EFFECT = {"offload"}                                       # on a CPU


def others(name: str, setting: Setting) -> list:
    """The values of a setting that are not its default: all of them where they can be counted, else the one in OTHER."""
    if isinstance(setting.default, bool):
        return [not setting.default]
    if setting.kind.names:
        return [option for option in setting.kind.names if option != setting.default]
    return [OTHER[name]] if name in OTHER else ["give this setting another value in OTHER"]


@pytest.mark.parametrize("name, value", [(name, value) for name, setting in annotations.settings(Config, "fedvtc", CHOICES).items()
                                         for value in others(name, setting)])
def test_every_setting_runs_and_does_something(name, value):
    context = CONTEXT.get(name, {})
    plain, found = baseline(**context), baseline(**(context | {name: value}))
    assert finite(found.states[-1].server) and all(finite(found.state(client)) for client in range(CLIENTS))
    assert all(np.isfinite(number) for account in found.accounts for values in account["metrics"].values() for number in values.values())
    same = [bits(found.state(client)) == bits(plain.state(client)) for client in range(CLIENTS)]
    assert all(same) if name in WITHOUT_EFFECT else not all(same)


@pytest.mark.parametrize("dm", [*MATCHINGS, "off"])
def test_clients_together_give_what_each_gives_alone(dm):
    data = {"partition": "iid"}                                    # equal shards, so that clients of one architecture share every step
    one, other = (went({"dm": dm, "sigma_source": "learnable"}, data=data, federation={"rounds": 2}, training={"batch": 16, "engine": engine})
                  for engine in ("sequential", "vmap"))
    for client in range(CLIENTS):
        here, there = one.state(client, 2), other.state(client, 2)
        assert all(torch.allclose(here[path], there[path], rtol=1e-3, atol=1e-4) for path in here)


# Offloading


@pytest.mark.parametrize("settings", [{}, {"vtc_sync": "none", "sigma_source": "learnable"}], ids=["averaged", "kept"])
def test_while_the_classifier_trains_the_vtc_rests_apart(settings, monkeypatch):
    fit, seen = ClientSite.fit, []

    def watched(self, group, turns, *arguments, **options):
        seen.append((turns[0].trains[0], {path.split("/")[0] for path in group.state}))
        return fit(self, group, turns, *arguments, **options)
    monkeypatch.setattr(ClientSite, "fit", watched)
    found = went(settings | {"offload": True}, federation={"rounds": 3, "participation": 0.67})
    assert {trained: held for trained, held in seen if trained == "model"} == {"model": {"model"}}
    assert all({"model", "generator"} <= held for trained, held in seen if trained == "generator")
    assert all("generator/start.weight" in found.state(client) for client in range(CLIENTS))


@pytest.mark.gpu
def test_offloaded_psi_rests_in_host_memory_and_changes_no_result():
    kept, offloaded = (went({"offload": offload, "vtc_sync": "none"}, run={"device": "cuda"}, federation={"rounds": 3, "participation": 0.67})
                       for offload in (False, True))
    for client in range(CLIENTS):
        one, other = kept.state(client), offloaded.state(client)
        assert all(not leaf.is_cuda for path, leaf in other.items() if not path.startswith("model/"))
        assert all(leaf.is_cuda for path, leaf in other.items() if path.startswith("model/"))
        assert all(torch.allclose(one[path].cpu(), other[path].cpu(), rtol=1e-3, atol=1e-4) for path in one)
