"""Checkpoints that are broken, each in a way of its own: damage to a folder, and what is said of it."""

import json
import os
import struct

import numpy as np
from conftest import GPT2, random_tensors, write_folder
from safetensors.numpy import save_file

WORDS = ["<unk>", " her", " saw", " told", "I", " cat", *(f" word{number}" for number in range(37))]


# --- damage ---


def safetensors(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def weights(content):
    """Damage: other contents of model.safetensors, or a function of the present ones."""

    def damage(folder):
        path = folder / "model.safetensors"
        path.write_bytes(content(path.read_bytes()) if callable(content) else content)

    return damage


def offsets(*pairs, shape=(2,)):
    """A file with a tensor for each pair of offsets."""
    return safetensors(
        {f"t{i}": {"dtype": "F32", "shape": list(shape), "data_offsets": list(pair)} for i, pair in enumerate(pairs)},
        bytes(16),
    )


def config(**changes):
    """Damage: other values in config.json; None takes a key out."""

    def damage(folder):
        path = folder / "config.json"
        data = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))

    return damage


def text(name, content):
    """Damage: a file with other contents; None takes it away."""

    def damage(folder):
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            (folder / name).write_text(content)

    return damage


def tensors(change):
    """Damage: a change of the tensors."""

    def damage(folder):
        changed = random_tensors(GPT2)
        change(changed)
        write_folder(folder, GPT2, changed)

    return damage


def replace(key, make):
    return tensors(lambda t: t.update({key: make(t[key])}))


def stored_as(dtype):
    """Damage: wte.weight said to be of another dtype of as many bytes."""

    def change(content):
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        entry = header["wte.weight"]
        entry["dtype"] = dtype
        entry["shape"] = [43, 35 * 4] if dtype.startswith("F8") else [43, 35]
        return safetensors(header, content[8 + length :])

    return weights(change)


def index(keep=True, **places):
    """Damage: an index in the place of model.safetensors, with the token embedding or without."""

    def damage(folder):
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        if not keep:
            kept = {key: values for key, values in random_tensors(GPT2).items() if key != "wte.weight"}
            save_file(kept, folder / "part.safetensors")
        whole = dict.fromkeys(random_tensors(GPT2), "part.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": whole | places}))

    return damage


def enlarged(name, size):
    """Damage: a file of that many bytes, most of which the disk need not have."""

    def damage(folder):
        with (folder / name).open("ab") as file:
            file.truncate(size)

    return damage


def pipe(name):
    """Damage: in the place of a file a pipe that nobody writes to."""

    def damage(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return damage


def gone(folder):
    folder.rename(folder.with_name("elsewhere"))


def emptied(folder):
    gone(folder)
    folder.mkdir()


def only_a_file(folder):
    gone(folder)
    folder.write_text("no folder")


NOT_WHOLE = "model.safetensors: not a whole safetensors file"
NO_FIT = "model.safetensors: tensors do not fit config.json: "
CHECKPOINTS = {
    "missing folder": (gone, "./model: no such folder"),
    "a file for a folder": (only_a_file, "./model: a file; give the folder that holds it, with its config.json"),
    "empty folder": (emptied, "model/config.json: no such file"),
    "only pickles": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "only pytorch_model.bin, and pickles are never opened",
    ),
    "empty file": (weights(b""), NOT_WHOLE),
    "one byte": (weights(b"\x01"), NOT_WHOLE),
    "half a file": (weights(lambda content: content[: len(content) // 2]), NOT_WHOLE),
    "one byte short": (weights(lambda content: content[:-1]), NOT_WHOLE),
    "one byte more": (weights(lambda content: content + b"x"), NOT_WHOLE),
    "header longer than the file": (weights(safetensors(b"{}", length=1000)), NOT_WHOLE),
    "header of 2**62 bytes": (weights(safetensors(b"{}", length=2**62)), NOT_WHOLE),
    "header is a list": (weights(safetensors(b"[1, 2]")), NOT_WHOLE),
    "header is no text": (weights(safetensors(b"\xff\xfe{}")), NOT_WHOLE),
    "header of 40 MB": (weights(safetensors(b"{}", length=40_000_000)), "(header of 40,000,000 bytes)"),
    "a tensor described by a list": (weights(safetensors({"wte.weight": ["F32", [2], [0, 8]]}, bytes(8))), NOT_WHOLE),
    "a pipe for weights": (pipe("model.safetensors"), NOT_WHOLE + " (it is no regular file)"),
    "overlapping offsets": (weights(offsets((0, 8), (4, 12))), NOT_WHOLE),
    "offsets with a gap": (weights(offsets((0, 4), (8, 16))), NOT_WHOLE),
    "offsets past the end": (weights(offsets((0, 8), (8, 1 << 40))), NOT_WHOLE),
    "offsets backwards": (weights(offsets((16, 0))), NOT_WHOLE),
    "shape without its bytes": (weights(offsets((0, 16), shape=(3,))), NOT_WHOLE),
    "shape whose product overflows": (weights(offsets((0, 16), shape=(2**32, 2**32))), NOT_WHOLE),
    "a tensor too few": (tensors(lambda t: t.pop("h.1.ln_1.bias")), NO_FIT + "missing h.1.ln_1.bias [35]"),
    "a tensor too many": (
        tensors(lambda t: t.update({"h.7.ln\x1b[31m\n": np.zeros(2, np.float32)})),
        NO_FIT + r"unexpected h.7.ln\x1b[31m\n [2]",
    ),
    "a transposed tensor": (replace("h.0.mlp.c_fc.weight", lambda x: x.T), NO_FIT + "wrong shape h.0.mlp.c_fc.weight"),
    "integer weights": (stored_as("I32"), "model.safetensors: wte.weight is I32, expected one of F64, F32, F16, BF16"),
    "weights of 8 bits": (stored_as("F8_E4M3"), "wrong shape wte.weight [43, 140]"),
    "config is no JSON": (text("config.json", "{"), "model/config.json: not readable as JSON"),
    "config nested too deep": (text("config.json", "[" * 100_000), "model/config.json: not readable as JSON"),
    "config with a number too long": (
        text("config.json", '{"n_layer": ' + "9" * 9999 + "}"),
        "config.json: not readable as JSON",
    ),
    "config of a gigabyte": (enlarged("config.json", 10**9), "config.json: cannot be read (it is larger than 10 MB)"),
    "config is a pipe": (pipe("config.json"), "model/config.json: cannot be read (it is no regular file)"),
    "config is a list": (text("config.json", "[]"), "model/config.json: expected a JSON object, found list"),
    "another architecture": (
        config(model_type="llama"),
        "model_type is 'llama'; supported are 'gpt2', 'bert', 'roberta', 'xlm-roberta'",
    ),
    "no head count": (config(n_head=None), "model/config.json: n_head is missing"),
    "two head counts": (config(num_attention_heads=7), "num_attention_heads = 7 contradicts n_head = 5, which means"),
    "two depths": (config(num_hidden_layers=2), "config.json: num_hidden_layers = 2 contradicts n_layer = 3"),
    "heads that do not divide": (config(n_head=4), "n_embd = 35 is not a multiple of n_head = 4"),
    "a width that is not the tensors'": (config(n_embd=40), NO_FIT + "wrong shape h.0.attn.c_attn.bias [105], config"),
    "an inner width that is not": (config(n_inner=31), "h.0.mlp.c_fc.bias [29], config says [31]"),
    "more layers than there are": (config(n_layer=4), NO_FIT + "missing h.3.attn.c_attn.bias [105]"),
    "fewer layers than there are": (config(n_layer=2), NO_FIT + "unexpected h.2.attn.c_attn.bias [105]"),
    "10**12 layers": (config(n_layer=10**12), "n_layer = 1000000000000 is more than 10,000"),
    "fewer tokens than there are": (config(vocab_size=40), "wrong shape wte.weight [43, 35], config says [40, 35]"),
    "more positions than there are": (config(n_positions=18), "wrong shape wpe.weight [17, 35], config says [18, 35]"),
    "index out of its folder": (index(x="../part.safetensors"), "names a file outside its folder"),
    "index to nowhere": (
        index(keep=False, **{"wte.weight": "n.safetensors"}),
        "missing wte.weight [43, 35] (the index places it in n.safetensors, which does not exist)",
    ),
    "index to nowhere alone": (
        index(**dict.fromkeys(random_tensors(GPT2), "n.safetensors")),
        "names files that do not exist: n.safetensors",
    ),
    "index to a name too long": (
        index(**dict.fromkeys(random_tensors(GPT2), "n" * 5000 + ".safetensors")),
        "names files that do not exist",
    ),
    "index to no name": (index(x=""), "names a file that is not a .safetensors file: ''"),
    "index to a pickle": (index(x="pytorch_model.bin"), "names a file that is not a .safetensors file: 'pytorch"),
    "index to a pattern": (index(x="*.safetensors"), "names a file that is not a .safetensors file: '*.safetensors'"),
    "index to a pointer of Git LFS": (
        lambda f: (index()(f), text("part.safetensors", "version https://git-lfs.github.com/spec/v1\noid x\n")(f)),
        "model/part.safetensors: a Git LFS pointer instead of the file; run `git lfs pull` in its folder",
    ),
}


def tokenizer(**changes):
    """Damage: other entries in tokenizer.json, and in its parts."""

    def damage(folder):
        path = folder / "tokenizer.json"
        data = json.loads(path.read_text())
        for key, value in changes.items():
            data[key] = data[key] | value if isinstance(data[key], dict) else value
        path.write_text(json.dumps(data))

    return damage


TOKENIZERS = {
    "none": (text("tokenizer.json", None), "./model: has no tokenizer.json, vocab.json with merges.txt, or vocab.txt"),
    "another model's": (
        tokenizer(model={"vocab": {word: 43 + index for index, word in enumerate(WORDS)}}),
        ", the model has 43; they do not belong together",
    ),
    "no JSON": (text("tokenizer.json", "{"), "model: tokenizer files cannot be read"),
    "half of one": (text("tokenizer.json", '{"version": "1.0", "model": {"type": "WordLevel"'), "cannot be read"),
    "one that panics when it is read": (
        tokenizer(normalizer={"type": "Precompiled", "precompiled_charsmap": ""}),
        "model: tokenizer files cannot be read",
    ),
    "a pointer of Git LFS": (
        text("tokenizer.json", "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1355256\n"),
        "model/tokenizer.json: a Git LFS pointer instead of the file; run `git lfs pull` in its folder",
    ),
    "one without the word for all others": (
        tokenizer(model={"unk_token": "?", "vocab": {" her": 1, "I": 4}}),
        "model: the tokenizer fails (",
    ),
}


# --- weights that are NaN or infinite ---


def spoil(t):
    t["h.1.attn.c_attn.weight"][3, 5] = np.nan
    t["h.1.attn.c_attn.weight"][4, 40:42] = -np.inf


SPOILT = "model/model.safetensors: NaN or infinite values in h.1.attn.c_attn.weight (3 of 3,675)"
