"""Checkpoints of a special kind: in several files, with tokenizers of whole words."""

import json

from conftest import GPT2, random_tensors, write_folder, write_word_tokenizer
from safetensors.numpy import save_file

# Words of a short tokenizer.
WORDS = ["?", "a", " cat", " saw", " her", " run", " home"]
# Of one that fills the vocabulary; a text of eleven of them; and one that tries to be part of a page.
MANY_WORDS = [f" w{index}" for index in range(GPT2.vocab_size)]
MANY_TEXT = "".join(MANY_WORDS[index] for index in (3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37))
HOSTILE = "</script><script>hacked = 1</script><!-- <img src=x onerror=hacked=1>\"'"


def write_sharded(folder, config, rename=lambda name: name):
    write_folder(folder, config)
    tensors = random_tensors(config)
    (folder / "model.safetensors").unlink()
    places = {key: f"model-{index % 2 + 1:05d}-of-00002.safetensors" for index, key in enumerate(tensors)}
    for name in set(places.values()):
        save_file({key: tensors[key] for key in tensors if places[key] == name}, folder / name)
    index = {"metadata": {}, "weight_map": {key: rename(name) for key, name in places.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_checkpoint_of_words(path, config=GPT2, tensors=None):
    """A tiny checkpoint with a tokenizer whose words are w0, w1, …"""
    write_folder(path, config, tensors)
    if config.tokenizer_class not in ("BertTokenizer", "DistilBertTokenizer"):
        if config.tokenizer_class != "GPT2Tokenizer":  # for tokenizer.json alone to decide
            (path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        return write_word_tokenizer(path, MANY_WORDS)
    words = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", *(word.strip() for word in MANY_WORDS[5:])]
    (path / "vocab.txt").write_text("\n".join(words))
    return path
