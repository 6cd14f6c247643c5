"""Errors of the package: one base, and children that are also the builtin type a caller would expect."""


class AdapterBankError(Exception):
    """Base of every error this package raises on bad input. The command line prints it as one ``Error:`` line."""


class AdapterError(AdapterBankError, ValueError):
    """An adapter can't be used; the message names it, the module where one is at fault, and the way out."""


class BankError(AdapterBankError, ValueError):
    """A bank can't be built, read or changed as asked."""


class UnknownNameError(AdapterBankError, KeyError):
    """A name that the bank doesn't hold."""

    # KeyError shows the repr of its argument, which would put the message in quotes
    __str__ = Exception.__str__


class MissingFileError(AdapterBankError, FileNotFoundError):
    """A path that should hold an adapter or a bank holds nothing."""

    __str__ = Exception.__str__
