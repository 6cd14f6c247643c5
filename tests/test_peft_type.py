import copy
import pickle
import subprocess
import sys

import peft
import pytest
from peft import PeftType

from adapterbank.errors import AdapterBankError
from adapterbank.peft_type import add_peft_type, register
from adapterbank.tuner import EigenLoraConfig


def test_the_member_is_one_like_any_other():
    kind = PeftType.EIGENLORAX
    assert PeftType("EIGENLORAX") is kind
    assert PeftType["EIGENLORAX"] is kind
    assert kind in list(PeftType)
    assert kind == "EIGENLORAX"
    assert (kind.name, kind.value) == ("EIGENLORAX", "EIGENLORAX")
    assert pickle.loads(pickle.dumps(kind)) is kind
    assert copy.deepcopy(kind) is kind
    assert len(set(PeftType)) == len(PeftType.__members__)


def test_adding_it_again_changes_nothing():
    before = list(PeftType)
    assert add_peft_type("EIGENLORAX") is PeftType.EIGENLORAX
    register("EIGENLORAX", EigenLoraConfig, object, "eig_")
    assert list(PeftType) == before


def test_somebody_elses_method_of_that_name_is_not_overwritten():
    with pytest.raises(AdapterBankError, match="PEFT has a method LORA already"):
        register("LORA", EigenLoraConfig, object, "eig_")


def test_an_old_peft_is_refused(monkeypatch):
    monkeypatch.setattr(peft, "__version__", "0.20.3")
    with pytest.raises(AdapterBankError, match=r"needs peft >= 0\.21, this is 0\.20\.3"):
        add_peft_type("ANOTHER")


def test_other_processes_unpickle_it_after_an_import():
    text = repr(pickle.dumps(PeftType.EIGENLORAX))
    code = f"import pickle, adapterbank.tuner; assert pickle.loads({text}).value == 'EIGENLORAX'"
    subprocess.run([sys.executable, "-c", code], check=True)
