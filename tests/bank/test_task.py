"""Tasks that were trained in a bank join it; their directories are written by hand here, PEFT is not needed."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapterbank.adapters import LoraAdapter
from adapterbank.adapters.task import open_adapter
from adapterbank.bank import Bank, shared_basis, store
from adapterbank.bank import bank as bank_module
from adapterbank.bank.joining import multiply_out
from adapterbank.bank.shared_basis import beside_random
from adapterbank.codec.rows import pack_rows, unpack_rows
from adapterbank.errors import AdapterBankError, AdapterError, BankError
from damage import spoil
from families import make_family

STORED, DERIVED = 4, 12
"""Directions that the bank stores, and more than that (it stores 6)."""
ways = pytest.mark.parametrize(
    "fields",
    [
        {}, {"train": "core"}, {"train": "head", "lora_alpha": 6.0}, {"train": "core", "lora_alpha": 0.5},
        {"random_directions": 3}, {"train": "core", "random_directions": 2},
    ],
    ids=str,
)  # fmt: skip
PRIVATE = [
    {"free_rank": 2}, {"gradient_directions": 2},
    {"gradient_directions": 3, "gradient_bits": 8, "lora_alpha": 1.5}, {"train": "components"},
    {"train": "core", "random_directions": 2, "free_rank": 1},
]  # fmt: skip


@pytest.fixture
def bank_dir(fine_dir):
    """Directions are derived from members of full rank."""
    return fine_dir


def make_task(directory, bank, *, k=DERIVED, r=3, head=False, prefix="", only=(), save_basis=False, seed=0, **fields):
    """Write the directory of a task on ``bank.basis(k)``."""
    seeded = torch.Generator().manual_seed(seed)
    basis = bank.basis(k)
    config = {
        "peft_type": "EIGENLORAX", "base_model_name_or_path": bank.index.base, "task_type": "CAUSAL_LM", "bank": "bank",
        "r": r, "k": k, "lora_alpha": None, "train": "coefficients", "free_rank": 0, "random_directions": 0,
        "base_directions": 0, "gradient_directions": 0, "gradient_bits": 4, "seed": 7, "use_mean": False,
        "edge_layers": 0, "save_basis": save_basis, "bank_fingerprint": basis.fingerprint,
        "bank_members": basis.members, "basis_probe": basis.probe,
    } | fields  # fmt: skip
    tensors = {}
    for name, part in basis.modules.items():
        if only and name not in only:
            continue

        more = config["random_directions"] + config["gradient_directions"]
        (k_in, k_out), (d_in, d_out), rows = part.k, part.sizes, r // part.fold
        at = f"base_model.model.{name.removeprefix(prefix)}"
        shapes = {"eig_coef_A": (rows, k_in + more), "eig_coef_B": (k_out + more, rows)}
        if config["train"] == "core":
            shapes = {"eig_core": (k_out + more, k_in + more)}
        if config["gradient_directions"]:
            for side, d in (("in", d_in), ("out", d_out)):
                drawn = torch.randn(config["gradient_directions"], d, generator=seeded)
                tensors[f"{at}.eig_gradient_{side}"] = pack_rows(drawn, config["gradient_bits"])
        if config["free_rank"]:
            shapes |= {"eig_free_A": (config["free_rank"], d_in), "eig_free_B": (d_out, config["free_rank"])}
        tensors |= {f"{at}.{key}": torch.randn(shape, generator=seeded) / 8 for key, shape in shapes.items()}
        if config["train"] == "components":
            tensors[f"{at}.eig_V"], tensors[f"{at}.eig_U"] = part.V + 0.01, part.U - 0.01
        if save_basis:
            tensors[f"{at}.shared_V.0123456789abcdef"] = part.V.clone()
            tensors[f"{at}.shared_U.0123456789abcdef"] = part.U.clone()
    if head:
        tensors["base_model.model.score.weight"] = torch.randn(3, 64, generator=seeded).to(torch.bfloat16)
        config["modules_to_save"] = ["score"]
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def products(directory, basis):
    """``A'`` and ``B'`` of a task without private parts, from its file."""
    tensors = load_file(directory / "adapter_model.safetensors")
    config = json.loads((directory / "adapter_config.json").read_text())
    scale, found = (config["lora_alpha"] or config["r"]) / config["r"], {}
    for name, part in basis.modules.items():
        weights, V, U = {k.rpartition(".")[2]: v for k, v in tensors.items() if name in k}, part.V, part.U
        if config["random_directions"]:
            V, U = beside_random(V, U, config["random_directions"], seed=config["seed"], module=name)
        if "eig_core" in weights:
            found[name] = V, U @ (scale * weights["eig_core"])
        else:
            A, B = weights["eig_coef_A"] @ V, U @ weights["eig_coef_B"]
            found[name] = A.reshape(-1, part.sizes[0]), scale * B.T.reshape(-1, part.sizes[1]).T
    return found


def same(adapter, expected):
    assert adapter.modules.keys() == expected.keys()
    for module, (A, B) in expected.items():
        factors = adapter.factors(module)
        assert torch.equal(factors.A, A)
        assert torch.equal(factors.scale * factors.B, B)


# --- without loss -----------------------------------------------------------------------------------------------------


@ways
@pytest.mark.parametrize("k", [STORED, DERIVED])
def test_a_task_of_coefficients_comes_back_to_the_bit(bank, bank_dir, tmp_path, k, fields):
    task = make_task(tmp_path / "task", bank, k=k, **fields)
    expected = products(task, bank.basis(k))
    assert (bank.basis(k).members > 0) == (k == DERIVED)
    assert bank.add(task) == ["task"]
    assert bank["task"].error == 0
    same(bank.reconstruct("task"), expected)
    assert bank.verify([task])["task"] < 1e-6
    bank.save(bank_dir)
    loaded = Bank.load(bank_dir)
    assert loaded.index == bank.index
    same(loaded.reconstruct("task"), expected)


def test_a_coefficient_takes_four_bytes(bank, tmp_path):
    bank.add(make_task(tmp_path / "task", bank))
    entry, before = bank["task"], len(replace(bank.index, members={}).to_json())
    assert entry.bytes < 4 * 4 * 3 * 2 * DERIVED + 120
    assert entry.source_bytes == (tmp_path / "task" / "adapter_model.safetensors").stat().st_size
    assert len(json.dumps(bank.index.configs)) < before + 60  # no list of all modules by name


def test_the_head_and_its_config_come_along(bank, tmp_path):
    task = make_task(tmp_path / "task", bank, head=True)
    head = load_file(task / "adapter_model.safetensors")["base_model.model.score.weight"]
    bank.add(task)
    restored = bank.reconstruct("task")
    assert torch.equal(restored.extra("score.weight"), head)
    assert restored.task_type == "CAUSAL_LM"
    assert restored.config["modules_to_save"] == ["score"]
    restored.save(tmp_path / "lora")
    assert LoraAdapter.load(tmp_path / "lora").modules == restored.modules


@pytest.mark.parametrize(
    "fit",
    [
        {"k": 5}, {"k": 5, "quantize": False}, {"method": "eigenlora", "k": 4}, {"method": "flat", "k": 3},
        {"quantize": False, "max_error": 0.05},
    ],
    ids=str,
)  # fmt: skip
def test_plain_banks_take_tasks_without_loss_too(planted, tmp_path, fit):
    bank = Bank.fit(planted[:5], **fit)
    flat = fit.get("method") == "flat"
    task = make_task(tmp_path / "task", bank, k=None, r=4 if flat else 3)
    expected = products(task, bank.basis())
    bank.add(task)
    same(bank.reconstruct("task"), expected)


def test_a_layer_may_be_missing_and_a_prefix_may_differ(bank, tmp_path):
    some = bank.directions().keys() - {"model.layers.0.self_attn.q_proj"}
    bank.add(make_task(tmp_path / "task", bank, prefix="model.", only=some))
    assert bank.reconstruct("task").modules.keys() == some


def test_a_task_that_brought_its_basis_joins_its_bank_without_loss(bank, tmp_path):
    task = make_task(tmp_path / "task", bank, save_basis=True)
    bank.add(task)
    assert bank["task"].task is not None
    same(bank.reconstruct("task"), products(task, bank.basis(DERIVED)))


def test_a_task_that_brought_its_basis_joins_another_bank_as_any_adapter(bank, planted, tmp_path, distance):
    task = make_task(tmp_path / "task", bank, save_basis=True)
    other = Bank.fit(planted[:4], max_error=0.2)
    bank.add(task)
    other.add(task)
    assert other["task"].task is None
    assert distance(bank.reconstruct("task"), other.reconstruct("task")) <= 0.2


def test_tasks_leave_the_basis_as_it_is(bank, tmp_path):
    before = bank.basis(DERIVED)
    for i in range(6):  # each was trained after the last had joined
        bank.add({f"t{i}": make_task(tmp_path / f"t{i}", bank, seed=i)})
    assert bank.basis(DERIVED) is before
    assert {bank[f"t{i}"].task.members for i in range(6)} == {10}


def test_members_that_come_later_leave_a_task_as_it_is(bank, later, tmp_path):
    task = make_task(tmp_path / "task", bank)
    expected = products(task, bank.basis(DERIVED))
    bank.add([later[0], task])
    bank.add(later[1:])
    assert bank.basis(DERIVED).fingerprint != bank["task"].task.fingerprint
    same(bank.reconstruct("task"), expected)
    bank.add({"again": task})  # trained before those came
    same(bank.reconstruct("again"), expected)


def test_a_task_without_directions_of_the_bank_joins_without_loss(bank, bank_dir, tmp_path):
    task = make_task(tmp_path / "task", bank, k=0, random_directions=9)
    bank.add(task)
    bank.save(bank_dir)
    same(Bank.load(bank_dir).reconstruct("task"), products(task, bank.basis(0)))


# --- coded ------------------------------------------------------------------------------------------------------------


@ways
@pytest.mark.parametrize("max_error", [0.3, 0.03, 1e-4])
def test_coefficients_are_coded_within_a_promised_error(bank, bank_dir, tmp_path, distance, fields, max_error):
    task = make_task(tmp_path / "task", bank, head=True, **fields)
    expected, coefficients = multiply_out(open_adapter(task), bank)
    assert coefficients is not None
    bank.add(task, max_error=max_error)
    bank.add({"kept": task})
    bank.save(bank_dir)
    loaded = Bank.load(bank_dir)
    restored = loaded.reconstruct("task")
    assert loaded["task"].task.coded
    assert loaded["task"].error <= max_error
    assert distance(expected, restored) == pytest.approx(loaded["task"].error, rel=0.02, abs=2e-6)
    assert dict(restored.modules) == dict(expected.modules)
    assert torch.equal(restored.extra("score.weight"), expected.extra("score.weight"))
    assert loaded["task"].bytes < loaded["kept"].bytes
    if fields.get("train") != "core":  # a core of all directions as two factors is twice as large
        bits = -math.log2(max_error) + 2
        assert loaded["task"].bytes < bits / 32 * loaded["kept"].bytes + 200
    assert loaded.verify({"task": task})["task"] == pytest.approx(loaded["task"].error, rel=0.02, abs=2e-6)


def test_a_promise_holds_for_any_adapter_that_is_added(bank, later, tmp_path, distance):
    bank.add([later[0], make_task(tmp_path / "task", bank, free_rank=1)], max_error=0.01)
    assert bank["task"].task is None
    assert 0 < bank["task"].error <= 0.01
    assert distance(later[0], bank.reconstruct("later_0")) <= 0.01


def test_a_promise_that_makes_no_sense_is_refused(bank, planted, later):
    with pytest.raises(BankError, match=r"max_error must be a positive number, not -1\.0"):
        bank.add(later[0], max_error=-1.0)
    with pytest.raises(BankError, match=r"max_error=0\.1: this bank holds int16 values"):
        Bank.fit(planted[:3], k=4).add(later[0], max_error=0.1)


def test_a_coded_task_is_coded_again_before_a_member_that_it_stands_on_goes(bank, tmp_path, distance):
    task = make_task(tmp_path / "task", bank)
    original, _ = multiply_out(open_adapter(task), bank)
    bank.add(task, max_error=0.05)
    before = bank["task"]
    assert bank.remove("adapter_003") == ["task"]
    found = distance(original, bank.reconstruct("task"))
    assert bank["task"].bound
    assert found <= bank["task"].error <= 1.11 * before.error


@pytest.mark.parametrize("train", ["coefficients", "core"])
@pytest.mark.parametrize("max_error", [1e-6, 1e-8])
def test_what_can_not_be_coded_well_enough_or_in_less_is_kept(bank, tmp_path, train, max_error):
    task = make_task(tmp_path / "task", bank, train=train)
    bank.add({"kept": task})
    bank.add(task, max_error=max_error)
    assert bank["task"].bytes <= bank["kept"].bytes
    assert bank["task"].error <= max_error


def test_a_coded_task_may_lack_a_layer(bank, tmp_path, distance):
    some = bank.directions().keys() - {"model.layers.0.self_attn.q_proj"}
    task = make_task(tmp_path / "task", bank, prefix="model.", only=some, train="core", random_directions=2)
    expected, _ = multiply_out(open_adapter(task), bank)
    bank.add(task, max_error=0.05)
    assert distance(expected, bank.reconstruct("task")) == pytest.approx(bank["task"].error, rel=0.02)


def test_a_layer_that_no_member_changed_has_no_coefficients_to_code(planted, tmp_path):
    first = LoraAdapter.load(planted[0])
    dead = next(iter(first.modules))
    factors = {m: first.factors(m) for m in first.modules}
    factors[dead] = replace(factors[dead], B=torch.zeros_like(factors[dead].B))
    bank = Bank.fit([LoraAdapter.from_factors("only", factors, base=first.base)], max_error=0.05)
    task = make_task(tmp_path / "task", bank, k=3)
    assert 0 in bank.basis(3).modules[dead].k
    bank.add(task, max_error=0.05)
    assert bank["task"].error <= 0.05
    assert not bank.reconstruct("task").factors(dead).update().any()


@pytest.mark.parametrize("again", ["absorb", "compact", "combine"])
def test_fitting_again_counts_what_a_coded_task_had_lost(bank, later, tmp_path, distance, again):
    task = make_task(tmp_path / "task", bank)
    original, _ = multiply_out(open_adapter(task), bank)
    bank.add(task, max_error=0.05)
    if again == "absorb":
        bank.absorb(later[0])
    elif again == "compact":
        bank.compact(DERIVED)
    else:
        bank = Bank.combine(bank, Bank.fit(later, max_error=0.1), max_error=0.05)
    assert bank["task"].bound
    assert distance(original, bank.reconstruct("task")) <= bank["task"].error


def test_a_task_of_zeros_is_coded_too(bank, tmp_path):
    task = make_task(tmp_path / "task", bank)
    spoil(task, lambda tensors: [tensor.zero_() for tensor in tensors.values()])
    bank.add(task, max_error=0.05)
    assert all(not f.B.any() for f in (bank.reconstruct("task").factors(m) for m in bank.directions()))


def test_a_task_without_directions_of_the_bank_belongs_to_its_layers_and_keeps_its_base(bank, planted, tmp_path):
    task = make_task(tmp_path / "task", bank, k=0, random_directions=9)
    spoil(task, base_model_name_or_path="another/base")
    with pytest.raises(AdapterBankError, match="another/base"):
        bank.add(task)
    some = make_family(tmp_path / "f", n=3, rank=2, hidden=64, layers=3, shared_rank=3)
    with pytest.raises(BankError, match="can't join this bank"):
        Bank.fit(some, max_error=0.2).add(task)


# --- with parts of its own --------------------------------------------------------------------------------------------


def dense(directory, bank):
    """The update of each module, by the formula of the paper on the whole basis."""
    tensors = load_file(directory / "adapter_model.safetensors")
    config = json.loads((directory / "adapter_config.json").read_text())
    scale, found = (config["lora_alpha"] or config["r"]) / config["r"], {}
    for name, part in bank.basis(config["k"]).modules.items():
        w = {k.rpartition(".")[2]: v for k, v in tensors.items() if name in k}
        V, U = w.get("eig_V", part.V), w.get("eig_U", part.U)
        if config["random_directions"]:
            V, U = beside_random(V, U, config["random_directions"], seed=config["seed"], module=name)
        if "eig_gradient_in" in w:
            V = torch.cat([V, unpack_rows(w["eig_gradient_in"], V.shape[1], config["gradient_bits"])])
            U = torch.cat([U, unpack_rows(w["eig_gradient_out"], len(U), config["gradient_bits"]).T], dim=1)
        core = w["eig_core"] if "eig_core" in w else w["eig_coef_B"] @ w["eig_coef_A"]
        found[name] = scale * U @ core @ V
        if config["use_mean"]:
            A, B = w["eig_coef_A"] @ V + part.mean_in, U @ w["eig_coef_B"] + part.mean_out[:, None]
            found[name] = scale * B @ A
        if "eig_free_A" in w:
            found[name] = found[name] + scale * w["eig_free_B"] @ w["eig_free_A"]
    return found


@pytest.mark.parametrize("fields", PRIVATE, ids=str)
def test_a_task_with_parts_of_its_own_joins_like_any_adapter(bank, tmp_path, distance, fields):
    task = make_task(tmp_path / "task", bank, head=True, **fields)
    expected = dense(task, bank)
    bank.add(task)
    assert bank["task"].task is None
    assert bank["task"].error <= 0.1
    adapter, coefficients = multiply_out(open_adapter(task), bank)
    assert coefficients is None
    for module, dW in expected.items():
        torch.testing.assert_close(adapter.factors(module).update(), dW, rtol=1e-5, atol=1e-6)
    assert distance(adapter, bank.reconstruct("task")) <= 0.1
    assert bank.verify([task])["task"] == pytest.approx(bank["task"].error, rel=1e-3)


def test_random_directions_are_orthonormal_beside_the_basis_and_other_ones_in_each_module(bank):
    part = bank.basis(DERIVED).modules["model.layers.0.self_attn.q_proj"]
    V, U = beside_random(part.V, part.U, 5, seed=3, module="a")
    torch.testing.assert_close(V @ V.T, torch.eye(DERIVED + 5), rtol=0, atol=1e-5)
    torch.testing.assert_close(U.T @ U, torch.eye(DERIVED + 5), rtol=0, atol=1e-5)
    assert torch.equal(V, beside_random(part.V, part.U, 5, seed=3, module="a")[0])
    assert not torch.equal(V, beside_random(part.V, part.U, 5, seed=3, module="b")[0])


def test_the_mean_of_a_centred_basis_is_multiplied_out(planted, tmp_path):
    bank = Bank.fit(planted[:5], method="eigenlora", k=4)
    task = make_task(tmp_path / "task", bank, k=None, use_mean=True)
    adapter, coefficients = multiply_out(open_adapter(task), bank)
    assert coefficients is None
    for module, dW in dense(task, bank).items():
        torch.testing.assert_close(adapter.factors(module).update(), dW, rtol=1e-5, atol=1e-6)


# --- members that a task stands on ------------------------------------------------------------------------------------


def test_removing_a_member_that_a_task_stands_on_codes_the_task_again_first(bank, bank_dir, tmp_path, distance):
    bank.add([make_task(tmp_path / "task", bank, head=True), make_task(tmp_path / "narrow", bank, k=STORED)])
    before = {name: bank.reconstruct(name) for name in bank.names}
    narrow = bank["narrow"]
    assert bank.remove("adapter_003") == ["task"]
    assert bank["narrow"] == narrow  # stored directions need no member
    assert bank["task"].task is None
    assert 0 < bank["task"].error <= 1e-6
    assert bank.names == [name for name in before if name != "adapter_003"]
    bank.save(bank_dir)
    loaded = Bank.load(bank_dir)
    for name in loaded.names:
        assert distance(before[name], loaded.reconstruct(name)) <= (2e-6 if name == "task" else 0)
    assert torch.equal(loaded.reconstruct("task").extra("score.weight"), before["task"].extra("score.weight"))
    assert loaded.remove("adapter_004") == []


def test_removing_what_no_task_stands_on_leaves_tasks_exact(bank, later, tmp_path):
    task = make_task(tmp_path / "task", bank)
    expected = products(task, bank.basis(DERIVED))
    bank.add([task, later[0]])
    second = make_task(tmp_path / "second", bank, seed=1)
    bank.add(second)
    kept = products(second, bank.basis(DERIVED))
    assert bank.remove("later_0") == ["second"]  # "task" was there before
    same(bank.reconstruct("task"), expected)
    assert bank.remove("task") == []
    for module, (A, B) in kept.items():
        torch.testing.assert_close(bank.reconstruct("second").factors(module).update(), B @ A, rtol=0, atol=1e-5)


def test_a_task_is_not_lost_where_it_can_not_be_coded_again(bank, tmp_path, monkeypatch):
    bank.add(make_task(tmp_path / "task", bank))
    index = bank.index
    monkeypatch.setattr(bank_module, "MOST_RECODED_ERROR", 0.0)
    with pytest.raises(BankError, match=r"'task' stands on directions that come from 'adapter_000'.*remove 'task'"):
        bank.remove("adapter_000")
    assert bank.index is index


def test_renaming_members_leaves_tasks_exact(bank, tmp_path, monkeypatch):
    # fewer members are read than there are, and which ones must not depend on their names
    monkeypatch.setattr(shared_basis, "ENOUGH_ROWS", 1)
    task = make_task(tmp_path / "task", bank)
    expected = products(task, bank.basis(DERIVED))
    bank.add(task)
    for i, name in enumerate(bank.names):
        bank.rename(name, f"{9 - i % 10}-{name}")
    bank._shared.clear()
    same(bank.reconstruct(f"{9}-task"), expected)


def test_fitting_again_takes_tasks_along_within_its_error(bank, later, tmp_path, distance):
    task = make_task(tmp_path / "task", bank, head=True)
    bank.add(task)
    before = bank.reconstruct("task")
    other = Bank.fit(later, max_error=0.1)
    combined = Bank.combine(bank, other, max_error=0.05)
    assert distance(before, combined.reconstruct("task")) <= 0.05
    second = make_task(tmp_path / "second", bank, seed=1, free_rank=1)
    ours, _ = multiply_out(open_adapter(second), bank)
    bank.absorb(second)
    assert all(entry.task is None for entry in bank.index.members.values())
    assert distance(before, bank.reconstruct("task")) <= 0.1
    assert distance(ours, bank.reconstruct("second")) <= 0.1
    assert bank["task"].source == bank["task"].source


def test_compacting_takes_tasks_along(bank, tmp_path, distance):
    bank.add(make_task(tmp_path / "task", bank))
    before = bank.reconstruct("task")
    bank.compact(DERIVED)
    assert bank["task"].task is None
    assert distance(before, bank.reconstruct("task")) <= 0.1


def test_the_folder_that_the_base_was_loaded_from_does_not_matter(bank, tmp_path):
    # the fingerprint says that it is this bank's task
    bank.add(make_task(tmp_path / "task", bank, base_model_name_or_path="/home/somebody/models/base-copy"))
    assert bank.reconstruct("task").base == bank.index.base


# --- refused ----------------------------------------------------------------------------------------------------------


def drop(name):
    return lambda tensors: [tensors.pop(key) for key in list(tensors) if key.endswith(name)]


def put(name, value):
    return lambda tensors: tensors.update({key: value.clone() for key in tensors if key.endswith(name)})


REFUSED = [
    ({"base_directions": 2}, None, r"base_directions come from the base model's weights.*export_lora"),
    ({"bank_fingerprint": "0" * 16}, None, r"task 'task' can't join this bank: .*trained on the basis 0{16}"),
    ({"bank_fingerprint": None}, None, "no bank_fingerprint"),
    ({"bank_members": 11}, None, r"derived from 11 members, this bank has 10: it is another bank"),
    ({"basis_probe": 1e4}, None, "arithmetic derives differently"),
    ({"k": 10**6}, None, "can't give k=1000000 directions"),
    ({"r": 2}, None, r"eig_coef_A is \(3, 12\), config and basis say \(2, 12\)"),
    ({"r": "3"}, None, "has r='3'"),
    ({"r": None}, None, "no r"),
    ({"seed": True}, None, "has seed=True"),
    ({"seed": 2**70}, None, "has seed=1180591620717411303424"),
    ({"k": 2**70}, None, "has k=1180591620717411303424"),
    ({"lora_alpha": "x"}, None, "has lora_alpha='x'"),
    ({"free_rank": -1}, None, "has free_rank=-1"),
    ({"free_rank": 1}, None, "eig_free_A is missing"),
    ({"train": "core"}, None, "eig_core is missing"),
    ({"train": "everything"}, None, "train='everything' is unknown"),
    ({"gradient_bits": 5}, None, "gradient_bits=5"),
    ({"use_mean": True}, None, "the mean of a centred basis, this bank's has none"),
    ({"random_directions": 60}, None, "60 more directions don't fit beside 12"),
    ({}, drop("eig_coef_B"), "eig_coef_B is missing"),
    ({}, lambda t: t.clear(), "holds no coefficients"),
    ({}, lambda t: t.update({"base_model.model.layers.9.q.eig_coef_A": torch.ones(1)}), "no module for its layer"),
    ({}, lambda t: t.update({"base_model.model.a.eig_other": torch.ones(1)}), "eig_other has an unknown layout"),
    ({}, lambda t: t.update({"base_model.model.a.modules_to_save.b": torch.ones(1)}), "a whole live model"),
    ({}, put("q_proj.eig_coef_A", torch.full((3, 12), float("nan"))), "A has 192 values of 192 that are not finite"),
    ({}, put("q_proj.eig_coef_A", torch.ones(3, 12, dtype=torch.int32)), r"holds torch\.int32, expected floats"),
    ({}, put("q_proj.eig_coef_A", torch.ones(12)), r"eig_coef_A is \(12,\)"),
    ({"train": "components"}, lambda t: t.update(
        {k.replace("coef_A", "V"): torch.ones(5, 60) for k in t if "coef_A" in k}
        | {k.replace("coef_B", "U"): torch.ones(64, 5) for k in t if "coef_B" in k}), r"own basis is \(5, 60\)"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "change", "message"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_a_task_that_does_not_fit_is_refused_and_nothing_changes(bank, tmp_path, fields, change, message):
    task = spoil(make_task(tmp_path / "task", bank), change or (lambda tensors: None), **fields)
    index = bank.index
    with pytest.raises(AdapterBankError, match=message):
        bank.add(task)
    assert bank.index is index
    with pytest.raises(BankError, match="there is no adapter"):
        bank.add([task], skip_bad=True)
    assert bank.index is index


def test_a_task_that_does_not_fit_may_be_left_out(bank, planted, later, tmp_path):
    good, bad = make_task(tmp_path / "good", bank), make_task(tmp_path / "bad", bank)
    spoil(bad, bank_fingerprint="0" * 16)
    bank.add([bad, good, {"good": good}["good"], later[0]], skip_bad=True)
    assert [refused.name for refused in bank.refused] == [str(bad), str(good)]
    assert bank["good"].error == 0


def test_two_modules_that_fit_one_layer_are_named(bank, tmp_path):
    task = make_task(tmp_path / "task", bank, prefix="model.layers.0.")
    spoil(task, lambda t: [t.pop(k) for k in list(t) if "layers.1" in k])
    with pytest.raises(AdapterError, match=r"self_attn\.q_proj fits two modules of the bank, model\.layers\.0"):
        bank.add(task)


def test_a_fit_on_a_task_says_where_it_belongs(bank, planted, tmp_path):
    task = make_task(tmp_path / "task", bank)
    for attempt in (lambda: Bank.fit([*planted[:2], task]), lambda: LoraAdapter.load(task)):
        with pytest.raises(AdapterError, match=r"trained in a bank.*Bank\.add.*export_lora"):
            attempt()


# --- damaged banks ----------------------------------------------------------------------------------------------------


def with_member_file(bank, bank_dir, name, payload):
    """The saved bank with another payload of a member, hashes put right."""
    data, digest = store.serialise({"payload": payload})
    store.write_file(bank_dir, store.member_file(digest), data, digest)
    members = dict(bank.index.members)
    members[name] = replace(members[name], sha256=digest)
    return Bank(replace(bank.index, members=members), bank_dir)


@pytest.mark.parametrize("train", ["coefficients", "core"])
def test_every_damage_of_a_payload_is_an_error(bank, bank_dir, tmp_path, train):
    bank.add(make_task(tmp_path / "task", bank, k=STORED, train=train))
    bank.save(bank_dir)
    payload = load_file(bank_dir / store.member_file(bank["task"].sha256))["payload"]
    expected = products(tmp_path / "task", bank.basis(STORED))
    nan = payload.clone()
    nan[-4:] = torch.tensor([0, 0, 0xC0, 0x7F], dtype=torch.uint8)
    for damaged in (payload[:-4], torch.cat([payload, payload[:4]]), payload[:3], payload.to(torch.int16), nan):
        with pytest.raises(BankError):
            with_member_file(bank, bank_dir, "task", damaged).reconstruct("task")
    raised = 0
    for place in range(int(payload[0]) + 4):
        changed = payload.clone()
        changed[place] ^= 0x55
        try:
            restored = with_member_file(bank, bank_dir, "task", changed).reconstruct("task")
        except BankError:
            raised += 1
        else:
            same(restored, expected)  # the last bits of a range-coded stream say nothing
    assert raised > 4


def test_a_damaged_coded_task_is_an_error_or_another_finite_one(bank, bank_dir, tmp_path):
    bank.add(make_task(tmp_path / "task", bank, k=STORED), max_error=0.1)
    bank.save(bank_dir)
    payload = load_file(bank_dir / store.member_file(bank["task"].sha256))["payload"]
    raised = 0
    for place in range(len(payload)):
        changed = payload.clone()
        changed[place] ^= 0x55
        try:
            with_member_file(bank, bank_dir, "task", changed).reconstruct("task")
        except BankError:
            raised += 1  # others are updates that are finite, or reconstruct would have said so
    assert raised > 4
    with pytest.raises(BankError, match="member 'task': "):
        with_member_file(bank, bank_dir, "task", payload[:3]).reconstruct("task")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("members", 11), ("members", -1), ("members", True), ("k", -1), ("k", "3"), ("fingerprint", 3),
        ("probe", "1"), ("other", 1), ("random", -1), ("random", "2"), ("seed", 0.5),
    ],
)  # fmt: skip
def test_an_impossible_task_in_the_index_is_refused(bank, bank_dir, tmp_path, field, value):
    bank.add(make_task(tmp_path / "task", bank))
    bank.save(bank_dir)
    data = json.loads((bank_dir / "bank.json").read_text())
    data["members"]["task"]["task"][field] = value
    (bank_dir / "bank.json").write_text(json.dumps(data))
    with pytest.raises(BankError, match="damaged"):
        Bank.load(bank_dir)


def test_a_coded_task_in_a_bank_of_plain_values_is_damage(planted, tmp_path):
    bank = Bank.fit(planted[:4], k=4)
    bank.add(make_task(tmp_path / "task", bank, k=None))
    bank.save(tmp_path / "bank")
    text = (tmp_path / "bank" / "bank.json").read_text()
    (tmp_path / "bank" / "bank.json").write_text(text.replace('"probe":', '"coded":true,"probe":'))
    with pytest.raises(BankError, match="task 'task' is coded in a bank of int16 values"):
        Bank.load(tmp_path / "bank")


TASK_CHANGES = [
    {"fingerprint": "0" * 16}, {"probe": 1e5}, {"members": 9}, {"core": True}, {"random": 1}, {"random": 10**9},
]  # fmt: skip


@pytest.mark.parametrize("change", TASK_CHANGES, ids=str)
def test_a_task_that_means_another_basis_than_the_bank_has_is_an_error(bank, bank_dir, tmp_path, change):
    coded = make_task(tmp_path / "coded", bank, random_directions=2)
    bank.add(make_task(tmp_path / "task", bank))
    bank.add(coded, max_error=0.1)
    bank.save(bank_dir)
    for name in ("task", "coded"):
        entry = bank[name]
        members = dict(bank.index.members) | {name: replace(entry, task=replace(entry.task, **change))}
        if name == "task" or "core" not in change:  # coded coefficients have no form
            with pytest.raises(BankError, match=name if "random" not in change else "self_attn|trained on the basis"):
                Bank(replace(bank.index, members=members), bank_dir).reconstruct(name)


def test_another_seed_of_random_directions_is_an_error(bank, bank_dir, tmp_path):
    bank.add(make_task(tmp_path / "task", bank, random_directions=2))
    bank.save(bank_dir)
    entry = bank["task"]
    members = dict(bank.index.members) | {"task": replace(entry, task=replace(entry.task, seed=8))}
    with pytest.raises(BankError, match="derives differently"):
        Bank(replace(bank.index, members=members), bank_dir).reconstruct("task")


def test_a_task_before_the_members_it_needs_is_damage(bank, bank_dir, tmp_path):
    # it would have to be known in order to be derived
    bank.add(make_task(tmp_path / "task", bank))
    bank.save(bank_dir)
    data = json.loads((bank_dir / "bank.json").read_text())
    data["members"] = {"task": data["members"].pop("task"), **data["members"]}
    (bank_dir / "bank.json").write_text(json.dumps(data))
    with pytest.raises(BankError, match="needs 10 members before it, there are 0"):
        Bank.load(bank_dir)


def test_two_tasks_of_one_content_share_a_file(bank, bank_dir, tmp_path):
    task = make_task(tmp_path / "task", bank)
    bank.add({"one": task, "two": task})
    bank.save(bank_dir)
    bank.remove("one")
    bank.save(bank_dir)
    same(Bank.load(bank_dir).reconstruct("two"), products(task, bank.basis(DERIVED)))


def test_a_family_of_another_shape_is_named_by_the_layer(bank, tmp_path):
    other = Bank.fit(make_family(tmp_path / "f", n=3, rank=2, hidden=32, layers=2, shared_rank=3), max_error=0.2)
    task = make_task(tmp_path / "task", other, save_basis=True, k=None)
    with pytest.raises(AdapterError, match="its own basis is"):
        bank.add(task)
