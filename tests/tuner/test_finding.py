import json
import pickle
import shutil
from dataclasses import replace

import pytest
from peft import PeftModel, get_peft_model

from adapterbank.bank import Bank
from adapterbank.errors import AdapterBankError, AdapterError, BankError, MissingFileError
from adapterbank.tuner import EigenLoraConfig, load
from adapterbank.tuner.finding import VARIABLE, find_basis
from adapterbank.tuner.live import adapter_layers
from tiny_models import TARGETS, adapters_for, bert, eigen, llama, perturb


@pytest.fixture
def task(bank_dir, tmp_path, monkeypatch):
    """A saved task, in a place from which its bank is not to be seen."""
    perturb(get_peft_model(llama(), eigen(bank_dir, task_type="CAUSAL_LM"))).save_pretrained(tmp_path / "work" / "task")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "work" / "task"


def test_the_bank_is_found_by_argument(task, bank_dir):
    assert load(llama(), task, bank=bank_dir)
    assert load(llama(), task, bank=Bank.load(bank_dir))
    assert PeftModel.from_pretrained(llama(), task, bank=str(bank_dir))


def test_the_bank_is_found_by_the_environment(task, bank_dir, monkeypatch):
    for value in (bank_dir, bank_dir.parent, f"/nowhere:{bank_dir}"):
        monkeypatch.setenv(VARIABLE, str(value))
        assert PeftModel.from_pretrained(llama(), task)


@pytest.mark.parametrize("place", ["work/task/bank", "work/bank", "bank"])
def test_the_bank_is_found_beside_the_adapter_or_here(task, bank_dir, tmp_path, place):
    shutil.copytree(bank_dir, tmp_path / place)
    assert load(llama(), task)


def test_an_adapter_inside_its_bank_finds_it(bank_dir, tmp_path, monkeypatch, task):
    shutil.copytree(bank_dir, tmp_path / "elsewhere")
    shutil.move(task, tmp_path / "elsewhere" / "task")
    assert load(llama(), tmp_path / "elsewhere" / "task")


def test_a_missing_bank_is_named_with_all_places(task):
    with pytest.raises(
        MissingFileError, match=r"the bank 'bank', basis \w{16} was not found .*work/bank.*ADAPTERBANK_BANK"
    ):
        load(llama(), task)
    with pytest.raises(MissingFileError, match="EigenLoraConfig needs a bank"):
        get_peft_model(llama(), EigenLoraConfig())


def test_another_bank_is_not_taken_for_it(task, tmp_path, bank_dir):
    Bank.fit(adapters_for(llama(), TARGETS["llama"], n=6)[1:], max_error=0.1).save(tmp_path / "bank")
    with pytest.raises(BankError, match=r"was trained on the basis \w{16}, this bank's is"):
        load(llama(), task)
    # the right one is taken where both are there, but one that was named must be it
    shutil.copytree(bank_dir, task / "bank")
    assert load(llama(), task)
    with pytest.raises(BankError, match="was trained on the basis"):
        load(llama(), task, bank=tmp_path / "bank")


def test_members_that_came_later_do_no_harm(task, tmp_path, bank_dir):
    shutil.copytree(bank_dir, tmp_path / "bank")
    with Bank.edit(tmp_path / "bank") as bank:
        bank.add({"later": adapters_for(llama(), TARGETS["llama"], n=6)[5]})
    assert load(llama(), task)


def test_a_bank_that_changed_on_disk_is_read_again(tmp_path):
    adapters = adapters_for(llama(), TARGETS["llama"], n=6)
    Bank.fit(adapters[:5], max_error=0.1).save(tmp_path / "bank")
    _, before = find_basis(eigen(tmp_path / "bank"))
    with Bank.edit(tmp_path / "bank") as bank:
        bank.add(adapters[5])
    _, after = find_basis(eigen(tmp_path / "bank"))
    assert before.fingerprint != after.fingerprint


def test_the_wrong_model_is_refused_by_name(bank_dir):
    with pytest.raises(BankError, match=r"BertForSequenceClassification\) has none of the bank's modules"):
        get_peft_model(bert(), eigen(bank_dir))


def test_other_sizes_are_refused_by_name(bank_dir):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    wide = LlamaForCausalLM(
        LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, vocab_size=50)
    )
    with pytest.raises(BankError, match=r"maps 64 to 64 features, the bank's .*q_proj 32 to 32"):
        get_peft_model(wide, eigen(bank_dir))


def test_modules_that_the_bank_lacks_are_refused_by_name(bank_dir):
    with pytest.raises(BankError, match=r"no basis for model.layers.0.self_attn.k_proj; leave target_modules out"):
        get_peft_model(llama(), eigen(bank_dir, target_modules=["k_proj"]))


def test_a_bank_of_a_wrapped_model_fits_the_bare_one(bank_dirs):
    # bert.encoder... in the bank, encoder... in the model
    model = get_peft_model(bert().bert, eigen(bank_dirs["bert"]))
    assert all(name.startswith("encoder.") for name in model.targeted_module_names)


def test_a_mistyped_path_is_not_made_up_for_by_the_environment(bank_dir, monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, str(bank_dir))
    with pytest.raises(MissingFileError, match=r"there is no bank at .*/bnak; give bank="):
        get_peft_model(llama(), eigen(tmp_path / "bnak"))
    assert get_peft_model(llama(), EigenLoraConfig(r=4))  # without a path it is asked


def test_a_config_can_be_used_again_with_other_fields(bank_dir):
    config = eigen(Bank.load(bank_dir), k=8)
    get_peft_model(llama(), config)
    config.k = 12
    config.bank = bank_dir
    for again in (config, replace(config, k=6)):
        model = get_peft_model(llama(), again)
        assert {layer.basis_of["default"].k for layer in adapter_layers(model).values()} == {(again.k, again.k)}


def test_an_open_bank_is_named_as_it_is_saved(bank_dir, tmp_path):
    bank = Bank.fit(adapters_for(llama(), TARGETS["llama"]), max_error=0.1)
    config = eigen(bank)
    assert config.to_dict()["bank"] is None
    bank.save(tmp_path / "mine")
    assert config.to_dict()["bank"] == "mine"
    assert pickle.loads(pickle.dumps(config)).bank == str(tmp_path / "mine")


# --- broken files -----------------------------------------------------------------------------------------------------


def test_missing_and_strange_weights_are_errors(task, bank_dir):
    from safetensors.torch import load_file, save_file

    file = task / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file({k: v for k, v in tensors.items() if k != name}, file)
    with pytest.raises(AdapterError, match=f"lacks {name}"):
        load(llama(), task, bank=bank_dir)
    save_file(tensors | {"base_model.model.other.eig_coef_A": tensors[name].clone()}, file)
    with pytest.raises(AdapterError, match="for which the model has no place"):
        load(llama(), task, bank=bank_dir)
    save_file(tensors | {name: tensors[name][:, :3].contiguous()}, file)
    with pytest.raises(AdapterError, match="model and config expect"):
        load(llama(), task, bank=bank_dir)


def test_a_file_that_fails_leaves_the_model_as_it_was(task, bank_dir):
    from safetensors.torch import load_file, save_file

    plain, tuned = llama(), load(llama(), task, bank=bank_dir)
    tensors = load_file(task / "adapter_model.safetensors")
    save_file(dict(list(tensors.items())[1:]), task / "adapter_model.safetensors")
    for model in (plain, tuned):
        with pytest.raises(AdapterError, match="lacks"):
            load(model, task, bank=bank_dir, adapter_name="again")
    assert not hasattr(plain.model.layers[0].self_attn.q_proj, "base_layer")
    assert list(tuned.peft_config) == ["default"]
    save_file(tensors, task / "adapter_model.safetensors")
    load(tuned, task, bank=bank_dir, adapter_name="again", is_trainable=True)
    assert {n.rpartition(".")[2] for n, p in tuned.named_parameters() if p.requires_grad} == {"again"}


def test_other_methods_files_are_refused(tmp_path, bank_dir):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    with pytest.raises(AdapterBankError, match="is of a LoraConfig, expected a task that was trained in a bank"):
        load(llama(), tmp_path, bank=bank_dir)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "r=0 is no rank"),
        ({"train": "all"}, "train='all' is unknown"),
        ({"free_rank": -1}, "free_rank=-1 is negative"),
        ({"gradient_bits": 3}, "4 or 8 bits"),
        ({"edge_layers": 1, "gradient_directions": 2}, "gradient_directions go with"),
        ({"train": "core", "gradient_directions": 2}, "gradient_directions go with"),
        ({"lora_alpha": 0.0}, "makes no update"),
        ({"layers_pattern": "layers"}, "nothing without layers_to_transform"),
    ],
)
def test_contradictions_are_found_before_a_model_is_touched(bank_dir, fields, message):
    with pytest.raises(AdapterBankError, match=message):
        eigen(bank_dir, **fields)


def test_a_rank_above_the_basis_is_refused(bank_dir):
    with pytest.raises(AdapterBankError, match="r=9 is more than any layer's basis has directions, 8"):
        get_peft_model(llama(), eigen(bank_dir, r=9, k=8))
