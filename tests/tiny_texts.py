"""A language of a few words: tokenizers, data and banks for tiny models, and a training that is interrupted."""

import json

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from adapterbank.bank import Bank
from tiny_models import adapters_for

WORDS = {"red": "warm", "orange": "warm", "blue": "cold", "green": "cold"}
VOCABULARY = ["<pad>", "<eos>", "<unk>", *WORDS, "warm", "cold", "thing", *(str(i) for i in range(10))]


def save_base(model, folder):
    model.save_pretrained(folder)
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def save_bank(model, targets, folder):
    Bank.fit(adapters_for(model, targets), max_error=0.1).save(folder)
    return folder


def save_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Stop(BaseException):
    """As ctrl-c."""


def stop_at(step):
    def tell(stage, done, total):
        if (stage, done) == ("train", step):
            raise Stop

    return tell
