"""The one place that registers our methods with PEFT.

``PeftType`` is an enum without a door for others: a method needs a member of its own, because PEFT and transformers
call ``peft_type.value`` on it (PEFT 0.21, ``utils/peft_types.py``).
"""

from typing import Any

import peft
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

from adapterbank.errors import AdapterBankError

NEEDED = (0, 21)


def add_peft_type(name: str) -> PeftType:
    """Make ``PeftType.<name>``, or return it if it is there.

    Args:
        name: In upper case.

    Raises:
        AdapterBankError: If PEFT is too old.
    """
    version = tuple(int(part) for part in peft.__version__.split(".")[:2])
    if version < NEEDED:
        raise AdapterBankError(
            f"adapterbank needs peft >= {'.'.join(map(str, NEEDED))}, this is {peft.__version__}; upgrade peft"
        )
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    kind: Any = PeftType
    kind._member_names_.append(name)
    kind._member_map_[name] = member
    kind._value2member_map_[name] = member
    hashable = getattr(kind, "_hashable_values_", None)  # Python 3.12 and later look values up in it
    if hashable is not None:
        hashable.append(name)
    # enums refuse new attributes by their own __setattr__
    type.__setattr__(PeftType, name, member)
    return member


def register(name: str, config_cls: type, model_cls: type, prefix: str) -> None:
    """Register a method once.

    Raises:
        AdapterBankError: If somebody else has registered another method of that name.
    """
    kind = add_peft_type(name)
    there = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)
    if there is config_cls:
        return
    if there is not None:
        raise AdapterBankError(
            f"PEFT has a method {name} already ({there.__module__}); it and adapterbank's can't both be loaded"
        )
    register_peft_method(name=name.lower(), config_cls=config_cls, model_cls=model_cls, prefix=prefix)
