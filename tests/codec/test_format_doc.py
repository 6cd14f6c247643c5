"""A second reader, written from ``docs/format.md`` alone: numpy, the standard library, torch's random draw."""

import bisect
import hashlib
import json
import math
import zlib
from functools import cache

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save_file

from adapterbank.bank import Bank
from adapterbank.errors import BankError
from families import make_family

WRAP = (1 << 64) - 1


class Stream:
    """The range decoder, integers and values."""

    def __init__(self, data):
        self.words, self.at = np.frombuffer(data, dtype="<u4").tolist(), 0
        self.lower, self.range = 0, WRAP
        self.point = self.word() << 32 | self.word()

    def word(self):
        self.at += 1
        return self.words[self.at - 1] if self.at <= len(self.words) else 0

    def symbol(self, starts):
        """``starts``: where each symbol begins, and 2**24."""
        scale = self.range >> 24
        quantile = (self.point - self.lower & WRAP) // scale
        assert quantile < 1 << 24
        found = bisect.bisect_right(starts, quantile) - 1
        self.lower = self.lower + scale * starts[found] & WRAP
        self.range = scale * (starts[found + 1] - starts[found])
        if self.range < 1 << 32:
            self.lower, self.range = self.lower << 32 & WRAP, self.range << 32
            self.point = (self.point << 32 & WRAP) | self.word()
        return found

    def gamma(self):
        width, low = self.symbol(uniform(64)), 0
        for shift in range(0, width, 16):
            low |= self.symbol(uniform(1 << min(16, width - shift))) << shift
        return (1 << width) + low - 1

    def integer(self):
        value = self.symbol(INTEGERS) - 24
        return value + (self.gamma() if value == 24 else -self.gamma() if value == -24 else 0)

    def values(self, classes, d):
        classes = np.broadcast_to(classes, (len(classes), d))
        decoded = np.zeros(classes.shape)
        for c in sorted(set(classes.ravel().tolist())):
            if c > -6:
                decoded[classes == c] = self.of_class(c, int((classes == c).sum()))
        return decoded

    def of_class(self, c, count):
        b = max(0, math.ceil((c - 16) / 4))
        starts, level = table(c - 4 * b)
        top = len(level) - 1
        s = [self.symbol(starts) - top for _ in range(count)]
        if b:
            s = [x if abs(x) < top else int(math.copysign(top + self.gamma(), x)) for x in s]
            return [x * 2**b + self.symbol(uniform(1 << b)) - 2 ** (b - 1) for x in s]
        return [math.copysign(level[abs(x)] if abs(x) < top else top + self.gamma(), x) for x in s]


@cache
def uniform(n):
    return [i * ((1 << 24) // n) for i in range(n)] + [1 << 24]


def model(frequencies):
    f = np.array(frequencies, dtype=np.float32)
    scale = np.float32((1 << 24) - len(f)) / f.sum(dtype=np.float32)
    before = np.concatenate([[0], np.cumsum(f, dtype=np.float32)[:-1]]).astype(np.float32)
    return [int(x) + i for i, x in enumerate(before * scale)] + [1 << 24]


INTEGERS = model([max(1, round(2 ** (14 - abs(x) / 1.5))) for x in range(-24, 25)])


@cache
def table(c):
    """Where each symbol begins, and the levels of the magnitudes."""
    sigma = 2 ** (c / 4)
    top = math.ceil(6 * sigma) + 2

    def tail(edges):
        return np.array([math.erfc(x / math.sqrt(2)) / 2 for x in edges])

    def phi(edges):
        return np.array([math.exp(-x * x / 2) / math.sqrt(2 * math.pi) for x in edges])

    m = np.arange(top + 1)
    level, threshold = m.astype(float), m[:-1] + 0.5
    for _ in range(40):
        edge = np.concatenate([[0], threshold, [np.inf]]) / sigma
        mass = np.maximum(tail(edge[:-1]) - tail(edge[1:]), 1e-12)
        bits = -np.log2(mass)
        bits[0] -= 1
        level = np.where(mass > 1e-11, sigma * (phi(edge[:-1]) - phi(edge[1:])) / mass, m)
        level[0] = 0
        gap = np.maximum(np.diff(level), 1e-6)
        threshold = (level[:-1] + level[1:]) / 2 + math.log(2) / 6 * np.diff(bits) / (2 * gap)
        threshold = np.maximum.accumulate(np.clip(threshold, 0.5, m[1:]))
    edge = np.concatenate([[0], threshold, [np.inf]])
    mass = sum(share * -np.diff(tail(edge / (wide * sigma))) for share, wide in ((0.998, 1), (0.002, 3)))
    f = np.maximum(np.round(65536 * mass), 1)
    f[0] *= 2
    return model([*f[:0:-1], *f]), level


# --- files ------------------------------------------------------------------------------------------------------------


def read(directory, name, sha256):
    data = (directory / name).read_bytes()
    assert hashlib.sha256(data).hexdigest() == sha256
    tensors = load(data)
    payload = tensors.pop("payload").tobytes()
    length = int.from_bytes(payload[:4], "little")
    return payload[4 : 4 + length], payload[4 + length :], tensors


class Run(dict):
    """Running integers of one stream."""

    def __init__(self, stream):
        super().__init__()
        self.stream = stream

    def next(self, field):
        self[field] = self.get(field, 0) + self.stream.integer()
        return self[field]


def step(codes):
    return 2.0 ** (-np.array(codes)[:, None] / 4)


def slots(stream, modules):
    rank = scale = 0
    found = []
    for _ in modules:
        rank += stream.integer()
        scale += stream.integer() if rank else 0
        found.append((rank, scale))
    return found


def predictive_bases(directory, index):
    table, body, _ = read(directory, f"basis-{index['basis'][:16]}.safetensors", index["basis"])
    assert body == b""
    stream = Stream(table)

    def side(d):
        run, k = Run(stream), stream.integer()
        rows = [[run.next(f) for f in ("step", "class", "profile")] for _ in range(k)]
        codes, classes, profile = np.array(rows, dtype=int).reshape(k, 3).T
        return stream.values(classes[:, None], d) * step(codes), profile

    return [(side(d_in), side(d_out)) for _, d_in, d_out in index["modules"]]


def predictive_updates(table, body, index, bases):
    assert body == b""
    stream = Stream(table)
    run, updates = Run(stream), {}

    def side(name, D, profile, codes):
        rows = np.zeros((len(codes), D.shape[1]))
        if len(D):
            level = np.array([run.next(f"{name} level") for _ in codes])
            classes = np.clip(level[:, None] + profile[None, :], -6, 80)
            rows += stream.values(classes, len(D)) * step(codes) @ D
        remainder = np.array([run.next(f"{name} remainder") for _ in codes])
        return rows + stream.values(remainder[:, None], D.shape[1]) * step(codes)

    for (name, d_in, d_out), (rank, _), basis in zip(
        index["modules"], slots(stream, index["modules"]), bases, strict=True
    ):
        if not rank:
            continue
        codes = [run.next("step") for _ in range(run.next("pairs"))]
        if not codes:
            updates[name] = np.zeros((d_out, d_in))
            continue
        B = side("out", *basis[1], codes).T
        updates[name] = B @ side("in", *basis[0], codes)
    return updates


def plain_matrices(body, bits):
    at = 0

    def matrix(rows, cols):
        nonlocal at
        scale = 1.0
        if bits == 16:
            scale, at = np.frombuffer(body, "<f4", 1, at)[0], at + 4
        values = np.frombuffer(body, "<f4" if bits == 32 else "<i2", rows * cols, at)
        at += values.nbytes
        return values.astype(float).reshape(rows, cols) * scale

    return matrix


def plain_bases(directory, index, bits):
    table, body, _ = read(directory, f"basis-{index['basis'][:16]}.safetensors", index["basis"])
    stream, matrix = Stream(table), plain_matrices(body, bits)

    def side(d):
        k, fold, centred = (stream.integer() for _ in range(3))
        return matrix(k, fold * d), fold, matrix(1, fold * d) if centred else None

    return [(side(d_in), side(d_out)) for _, d_in, d_out in index["modules"]]


def plain_updates(table, body, index, bases, bits):
    matrix, updates = plain_matrices(body, bits), {}

    def side(shared, fold, mean, rank, d):
        if not len(shared):
            return matrix(rank, d)
        rows = matrix(rank // fold, len(shared)) @ shared
        return (rows if mean is None else rows + mean).reshape(rank, d)

    for (name, d_in, d_out), (rank, _), (inner, outer) in zip(
        index["modules"], slots(Stream(table), index["modules"]), bases, strict=True
    ):
        if not rank:
            continue
        k_in, k_out = len(inner[0]), len(outer[0])
        if k_in and k_out and inner[1] == 1 and inner[2] is None and rank > k_in * k_out / (k_in + k_out):
            u, s, v = np.linalg.svd(matrix(k_out, k_in), full_matrices=False)
            updates[name] = outer[0].T @ (u[:, :rank] * s[:rank]) @ v[:rank] @ inner[0]
        else:
            A = side(*inner, rank, d_in)
            updates[name] = side(*outer, rank, d_out).T @ A
    return updates


def shared_directions(directory, index):
    """Shared rows of each side of each module, and whether more of them can be derived."""
    if index["coding"] == "predictive":
        return [[(rows, True) for rows, _ in sides] for sides in predictive_bases(directory, index)]
    bits = {"int16": 16, "float32": 32}[index["coding"]]
    return [
        [(rows, not len(rows) and fold == 1 and mean is None) for rows, fold, mean in sides]
        for sides in plain_bases(directory, index, bits)
    ]


def with_random(S, count, seed):
    """Torch has no part in reading but this draw."""
    drawn, wanted = torch.Generator().manual_seed(seed), len(S) + count
    while len(S) < wanted:
        S = orthonormal(torch.randn(wanted - len(S), S.shape[1], generator=drawn).numpy().astype(float), S, least=1e-4)
    return S


def orthonormal(rows, against, least=0.1):
    kept = list(against)
    for row in rows:
        left = row.copy()
        for _ in range(2):
            for unit in kept:
                left = left - (left @ unit) * unit
        if np.linalg.norm(left) > least * np.linalg.norm(row):
            kept.append(left / np.linalg.norm(left))
    return np.array(kept).reshape(-1, rows.shape[1])


def task_basis(directory, index, task):
    k, modules = 32 if task["k"] is None else task["k"], index["modules"]
    ordinary = [name for name, member in index["members"].items() if "task" not in member][: task["members"]]
    shared = shared_directions(directory, index)
    stored = [[(orthonormal(rows, [])[:k], more and k > 0) for rows, more in sides] for sides in shared]
    lacking = [more and len(rows) < min(k, rows.shape[1]) for sides in stored for rows, more in sides]
    used = [index["members"][name]["sha256"] for name in ordinary] if any(lacking) else []
    recipe = json.dumps([index["basis"], k, used] if k else ["", 0, modules])
    assert hashlib.sha256(recipe.encode()).hexdigest()[:16] == task["fingerprint"]
    members = []
    if any(lacking):
        ordinary.sort(key=lambda name: index["members"][name]["sha256"])
        m = max(8, -(-16 * k // max(index["members"][name]["r"] for name in ordinary)))
        if len(ordinary) > m:
            ordinary = [ordinary[i * (len(ordinary) - 1) // (m - 1)] for i in range(m)]
        for name in ordinary:
            updates = updates_of(directory, name)[0]
            ranks = ranks_of(directory, index, name)
            members.append((updates, sum(np.sum(dW**2) for dW in updates.values()), ranks))
    probe, bases = 0.0, []
    for i, ((name, d_in, d_out), sides) in enumerate(zip(modules, stored, strict=True)):
        bases.append([])
        for j, (S, more) in enumerate(sides):
            d = S.shape[1]
            if more and len(S) < min(k, d):
                M, rows = np.zeros((d, d)), 0
                for updates, n, ranks in members:
                    if n and name in updates:
                        dW = updates[name].T if j else updates[name]
                        M, rows = M + dW.T @ dW / n, rows + min(ranks[name], d_in, d_out)
                P = np.eye(d) - S.T @ S
                values, vectors = np.linalg.eigh(P @ M @ P)
                told = min(max(0, min(k, rows, d) - len(S)), int((values > 1e-10 * np.trace(M)).sum()))
                found = vectors[:, ::-1][:, :told].T
                S = orthonormal(found * np.sign(found[np.arange(len(found)), np.abs(found).argmax(1)])[:, None], S)
            S = with_random(S, task.get("random", 0), zlib.crc32(f"{task.get('seed', 0)} {name}".encode()) + j)
            left, right = np.cos(2.399963 * np.arange(len(S)) + i), np.cos(1.7320508 * np.arange(d) + 2 * i + j)
            probe += left @ S @ right
            bases[-1].append(S)
    assert abs(probe - task["probe"]) < 0.01
    return bases


def ranks_of(directory, index, name):
    member = index["members"][name]
    table, _, _ = read(directory, f"{member['sha256'][:16]}.safetensors", member["sha256"])
    found = slots(Stream(table), index["modules"])
    return {name: rank for (name, _, _), (rank, _) in zip(index["modules"], found, strict=True)}


def task_updates(table, body, index, member, bases):
    matrix, updates, scale = plain_matrices(body, 32), {}, member["scales"][0]
    for (name, d_in, d_out), (rank, place), (V, U_T) in zip(
        index["modules"], slots(Stream(table), index["modules"]), bases, strict=True
    ):
        assert place == 0
        if rank and member["task"].get("core"):
            updates[name] = scale * U_T.T @ matrix(len(U_T), len(V)) @ V
        elif rank:
            fold = V.shape[1] // d_in
            A = (matrix(rank // fold, len(V)) @ V).reshape(rank, d_in)
            B = (U_T.T @ matrix(len(U_T), rank // fold)).T.reshape(rank, d_out).T
            updates[name] = scale * B @ A
    return updates


def coded_updates(table, body, index, bases):
    none = [((np.zeros((0, len(V))), None), (np.zeros((0, len(U_T))), None)) for V, U_T in bases]
    whole = {name: basis for (name, _, _), basis in zip(index["modules"], bases, strict=True)}
    narrow = {"modules": [(name, len(V), len(U_T)) for name, (V, U_T) in whole.items()]}
    cores = predictive_updates(table, body, narrow, none)
    return {name: whole[name][1].T @ core @ whole[name][0] for name, core in cores.items()}


def updates_of(directory, name):
    index = json.loads((directory / "bank.json").read_text(encoding="utf-8"))
    assert index["format"] == 1
    member = index["members"][name]
    table, body, extras = read(directory, f"{member['sha256'][:16]}.safetensors", member["sha256"])
    if "task" in member:
        bases = task_basis(directory, index, member["task"])
        if member["task"].get("coded"):
            return coded_updates(table, body, index, bases), extras
        assert member["error"] == 0
        return task_updates(table, body, index, member, bases), extras
    if index["coding"] == "predictive":
        return predictive_updates(table, body, index, predictive_bases(directory, index)), extras
    bits = {"int16": 16, "float32": 32}[index["coding"]]
    return plain_updates(table, body, index, plain_bases(directory, index, bits), bits), extras


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_error": 0.05}, {"max_error": 1e-5}, {"max_error": 0.9}, {"k": 3, "max_error": 0.05}, {"k": 5}, {"k": 2},
        {"k": 5, "quantize": False}, {"quantize": False, "max_error": 0.05}, {"method": "eigenlora", "k": 4},
        {"method": "eigenlora", "k": 4, "mean": "none"}, {"method": "flat", "k": 3, "quantize": False},
    ],
    ids=str,
)  # fmt: skip
def test_a_reader_written_from_the_document_sees_what_ours_sees(tmp_path, arguments):
    mixed = {} if arguments.get("method") == "flat" else {"ranks": (3, 4), "drop_layers": 0.3}
    family = make_family(
        tmp_path / "family", n=6, rank=4, hidden=24, d_out=20, layers=2, shared_rank=5, classifier=2, seed=1, **mixed
    )
    bank = Bank.fit(family, **arguments)
    bank.save(tmp_path / "bank")
    for path in family:
        updates, extras = updates_of(tmp_path / "bank", path.name)
        restored = bank.reconstruct(path.name)
        assert updates.keys() == restored.modules.keys()
        for module, dW in updates.items():
            ours = restored.factors(module).update().numpy()
            np.testing.assert_allclose(dW, ours, rtol=0, atol=2e-6 * max(np.abs(ours).max(), 1e-12))
        assert np.array_equal(extras["extra.score.weight"], restored.extra("score.weight").numpy())


@pytest.mark.parametrize(
    ("arguments", "k", "config"),
    [
        ({"max_error": 0.1}, 4, {}), ({"max_error": 0.02}, 10, {"lora_alpha": 5}), ({"max_error": 0.02}, None, {}),
        ({"max_error": 0.02}, 9, {"train": "core", "lora_alpha": 5}), ({"k": 5}, None, {}),
        ({"k": 5, "quantize": False}, 3, {"train": "core"}), ({"method": "eigenlora", "k": 4}, None, {}),
        ({"method": "flat", "k": 3}, None, {"r": 4, "lora_alpha": 1}),
        ({"max_error": 0.1}, 4, {"random_directions": 3, "seed": 5}), ({"k": 5}, 0, {"random_directions": 4}),
        ({"max_error": 0.02}, 0, {"train": "core", "random_directions": 6, "seed": -1}),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("coded", [{}, {"max_error": 0.05}], ids=["kept", "coded"])
def test_the_second_reader_sees_trained_tasks_too(tmp_path, arguments, k, config, coded):
    # more members than directions are derived from
    family = make_family(tmp_path / "family", n=23, rank=4, hidden=24, d_out=20, layers=2, shared_rank=5, seed=1)
    bank = Bank.fit(family, **arguments)
    basis, seeded, tensors = bank.basis(k), np.random.default_rng(0), {}
    config = {"peft_type": "EIGENLORAX", "r": 3, "k": k, "bank_fingerprint": basis.fingerprint} | config
    for name, part in basis.modules.items():
        rows, (k_in, k_out) = config["r"] // part.fold, (n + config.get("random_directions", 0) for n in part.k)
        shapes = {"coef_A": (rows, k_in), "coef_B": (k_out, rows)}
        for weight, shape in ({"core": (k_out, k_in)} if "train" in config else shapes).items():
            values = seeded.standard_normal(shape).astype(np.float32)
            tensors[f"base_model.model.{name}.eig_{weight}"] = values
    (tmp_path / "task").mkdir()
    save_file(tensors, tmp_path / "task" / "adapter_model.safetensors")
    config |= {"bank_members": basis.members, "basis_probe": basis.probe}
    (tmp_path / "task" / "adapter_config.json").write_text(json.dumps(config))
    if coded and bank.index.coding != "predictive":
        with pytest.raises(BankError, match="leave it out"):
            bank.add(tmp_path / "task", **coded)
        return
    bank.add(tmp_path / "task", **coded)
    assert bank["task"].task.coded == bool(coded)
    bank.save(tmp_path / "bank")
    updates, _ = updates_of(tmp_path / "bank", "task")
    restored = bank.reconstruct("task")
    assert updates.keys() == restored.modules.keys()
    for module, dW in updates.items():
        ours = restored.factors(module).update().numpy()
        # derived directions are as exact as the gaps between their eigenvalues are wide
        tolerance = 1e-3 if basis.members else 2e-6
        np.testing.assert_allclose(dW, ours, rtol=0, atol=tolerance * np.abs(ours).max())
