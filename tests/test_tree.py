"""Trees: joining, stacking, packing and naming of layouts."""
import pytest
import torch

from hpcfl import tree
from hpcfl.wire.packing import LINE, pack

TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool]


@pytest.fixture
def sample():
    """A Tree with all that packing has to cope with: odd sizes, several widths, a scalar, an empty and a transposed leaf."""
    leaves = {f"leaf.{i}": (torch.arange(2 * i + 3) % 5).to(dtype) for i, dtype in enumerate(TYPES)}
    return leaves | {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "transposed": torch.arange(6.0).view(2, 3).t()}


def test_nbytes_counts_elements_times_their_width():
    assert tree.nbytes({"a": torch.zeros(3, 2, dtype=torch.float64), "b": torch.zeros(5, dtype=torch.uint8)}) == 53
    assert tree.nbytes({}) == 0


def test_part_undoes_join():
    model, generator = {"head.weight": torch.ones(2)}, {"weight": torch.zeros(3)}
    joined = tree.join(model=model, generator=generator)
    assert set(joined) == {"model/head.weight", "generator/weight"}
    assert tree.equal(tree.part(joined, "model"), model) and tree.equal(tree.part(joined, "generator"), generator)


def test_part_does_not_confuse_names_that_begin_alike():
    assert tree.part({"model/a": torch.ones(1), "model2/a": torch.zeros(1)}, "model").keys() == {"a"}
    assert tree.part({"model/a": torch.ones(1)}, "generator") == {}


def test_clone_shares_no_memory_and_is_contiguous():
    original = {"a": torch.zeros(2, 3).t()}
    copy = tree.clone(original)
    original["a"].fill_(7.0)
    assert copy["a"].is_contiguous() and not copy["a"].any()


def test_clone_leaves_the_gradient_graph():
    assert not tree.clone({"a": torch.ones(2, requires_grad=True)})["a"].requires_grad


def test_integer_leaves_are_not_floating():
    assert tree.select_floating({"mean": torch.ones(1), "steps": torch.ones(1, dtype=torch.int64)}).keys() == {"mean"}


def test_row_undoes_stack():
    clients = [{"w": torch.full((2, 2), float(k)), "n": torch.tensor(k)} for k in range(3)]
    stacked = tree.stack(clients)
    assert stacked["w"].shape == (3, 2, 2) and stacked["n"].shape == (3,)
    assert all(tree.equal(tree.row(stacked, k), clients[k]) for k in range(3))


def test_row_is_a_view_and_rows_are_copies():
    stacked = {"w": torch.zeros(3, 2)}
    tree.row(stacked, 1)["w"].fill_(1.0)
    tree.rows(stacked, [1, 2])["w"].fill_(9.0)
    assert stacked["w"].tolist() == [[0, 0], [1, 1], [0, 0]]


def test_rows_come_in_the_order_asked_for():
    assert tree.rows({"n": torch.tensor([10, 11, 12])}, [2, 0])["n"].tolist() == [12, 10]


def test_repeat_gives_every_client_memory_of_its_own():
    repeated = tree.repeat({"w": torch.zeros(2), "n": torch.tensor(5)}, 3)
    repeated["w"][0].fill_(1.0)
    assert repeated["w"].tolist() == [[1, 1], [0, 0], [0, 0]] and repeated["n"].tolist() == [5, 5, 5]


def test_unpack_undoes_pack(sample):
    buffer = pack([sample])
    assert buffer.dtype == torch.uint8 and 0 <= len(buffer) - tree.nbytes(sample) < LINE
    assert tree.equal(tree.unpack(buffer, tree.layout(sample)), sample)


def test_packing_keeps_the_bits_of_nan_and_negative_zero():
    leaf = torch.tensor([float("nan"), -0.0, float("-inf")])
    unpacked = tree.unpack(pack([{"a": leaf}]), tree.layout({"a": leaf}))["a"]
    assert torch.equal(unpacked.view(torch.int32), leaf.view(torch.int32))


def test_unpacked_leaves_are_views_of_the_buffer(sample):
    buffer = pack([sample])
    unpacked = tree.unpack(buffer, tree.layout(sample))
    buffer.zero_()
    assert not any(leaf.any() for leaf in unpacked.values())


def test_every_leaf_lies_aligned_to_its_width(sample):
    unpacked = tree.unpack(pack([sample]), tree.layout(sample))
    assert all((leaf.storage_offset() * leaf.element_size()) % leaf.element_size() == 0 for leaf in unpacked.values())
    widths = [dtype.itemsize for _, _, dtype in tree.layout(sample)]
    assert widths == sorted(widths, reverse=True)


def test_an_empty_tree_is_an_empty_message():
    assert pack([{}]).numel() == 0 and tree.unpack(pack([{}]), ()) == {}


def test_layout_does_not_depend_on_insertion_order(sample):
    assert tree.layout(sample) == tree.layout(dict(reversed(sample.items())))


@pytest.mark.parametrize("other", [
    {"b": torch.zeros(2, 3)}, {"a": torch.zeros(3, 2)}, {"a": torch.zeros(2, 3, dtype=torch.float64)}, {"a": torch.zeros(2, 3), "b": torch.zeros(0)},
    {},
], ids=["path", "shape", "type", "more", "nothing"])
def test_digests_of_different_layouts_differ(other):
    one = tree.digest(tree.layout({"a": torch.zeros(2, 3)}))
    assert one != tree.digest(tree.layout(other))
    assert one == tree.digest(tree.layout({"a": torch.ones(2, 3)}))


def test_equal_sees_paths_types_shapes_and_values():
    one = {"a": torch.zeros(2)}
    assert tree.equal(one, {"a": torch.zeros(2)})
    for other in ({"b": torch.zeros(2)}, {"a": torch.zeros(2, dtype=torch.float64)}, {"a": torch.zeros(2, 1)}, {"a": torch.tensor([0.0, 1.0])}, {}):
        assert not tree.equal(one, other)


def test_rows_of_the_same_bits_have_the_same_fingerprint_and_no_others():
    stacked = {"a": torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, -2.0]]), "n": torch.tensor([3, 3, 3])}
    one, same, other = tree.fingerprints(stacked)
    assert one == same != other == tree.fingerprint(tree.row(stacked, 2))
    wider = {"a": stacked["a"].double(), "n": stacked["n"]}
    assert len({*tree.fingerprints(stacked), *tree.fingerprints(wider), tree.fingerprint({"b": stacked["a"][0], "n": stacked["n"][0]})}) == 5
    assert tree.fingerprint({"x": torch.tensor(0.0)}) != tree.fingerprint({"x": torch.tensor(-0.0)}), "bits, not values"


def test_a_leaf_that_was_written_replaced_added_or_dropped_has_changed():
    before = {name: torch.zeros(2, 2) for name in ("same", "written", "viewed", "replaced", "dropped")}
    marks, after = tree.marks(before), dict(before)
    after["written"].add_(1)
    after["viewed"][0].fill_(2)
    after |= {"replaced": after["replaced"].clone(), "added": torch.zeros(1)}
    del after["dropped"]
    assert tree.find_changed(marks, after) == {"written", "viewed", "replaced", "dropped", "added"}
    assert tree.find_changed(tree.marks(after), after) == set()


def test_a_number_of_what_is_said_fits_into_int64():
    numbers = {tree.number(said) for said in (["a"], ["b"], ["a", "b"], [("a", 1)])}
    assert len(numbers) == 4 and all(0 <= number < 2**63 for number in numbers) and tree.number(["a"]) == tree.number(["a"])


def test_the_root_of_a_path_is_its_part():
    assert [tree.root(path) for path in ("model/head.weight", "w", "optimizer/model/step/w")] == ["model", "w", "optimizer"]


def test_to_shares_what_is_already_there():
    leaf = torch.ones(2)
    assert tree.to({"a": leaf}, "cpu")["a"].data_ptr() == leaf.data_ptr()


@pytest.mark.gpu
def test_packing_brings_leaves_of_a_gpu_to_the_host(sample):
    there = tree.to(sample, "cuda")
    buffer = pack([there])
    assert buffer.device.type == "cpu" and tree.equal(tree.unpack(buffer, tree.layout(there)), sample)
