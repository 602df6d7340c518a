"""Training texts, tokenizers trained on them, and streams of their token ids."""

import json
import pydoc_data.topics
import re
from collections import Counter
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from jaxqkv.architectures.gpt2 import GPT2Config
from jaxqkv.checkpoints.config import Config
from training.sizes import BERT_SPECIALS, END

ALPHABET = 200  # number of characters in BERT's vocabulary, the most frequent ones


def read_documents(folder: Path) -> list[str]:
    """Returns every text of the folder, and Python's help topics, cleaned of WikiText's `<unk>`."""
    documents = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))]
    for path in sorted(folder.glob("*.jsonl")):
        documents += [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    if not documents:
        raise SystemExit(f"{folder}: no .txt and no .jsonl files to train on")
    documents += [text for _, text in sorted(pydoc_data.topics.topics.items())]
    return [re.sub(r" ?<unk>", "", document) for document in documents]


def split(documents: list[str]) -> tuple[list[str], list[str]]:
    """Returns the first nineteen twentieths of every document, and the held-out rest."""
    cuts = [len(document) * 19 // 20 for document in documents]
    return [d[:c] for d, c in zip(documents, cuts, strict=True)], [d[c:] for d, c in zip(documents, cuts, strict=True)]


def train_tokenizer(config: Config, texts: list[str]) -> tokenizers.Tokenizer:
    """Returns a tokenizer with the config's vocabulary size, the same for the same texts.

    Byte-level BPE for GPT-2, lower-cased WordPiece for BERT.
    """
    return _byte_pairs(config, texts) if isinstance(config, GPT2Config) else _word_pieces(config, texts)


def _byte_pairs(config: Config, texts: list[str]) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _word_pieces(config: Config, texts: list[str]) -> tokenizers.Tokenizer:
    normalizer = normalizers.BertNormalizer(lowercase=True)

    def fresh(vocabulary: dict[str, int] | None) -> tokenizers.Tokenizer:
        tokenizer = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
        tokenizer.normalizer = normalizer
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        return tokenizer

    counts = Counter(character for text in texts for character in normalizer.normalize_str(text))
    alphabet = sorted(sorted(counts, key=lambda character: (-counts[character], character))[:ALPHABET])
    # The trainer numbers characters inside words in an order that differs from run to run, and decides between equally
    # frequent pairs by those numbers; as special tokens they have numbers of their own. The vocabulary is then taken
    # over to a tokenizer that has no special tokens but BERT's.
    inside = [f"##{character}" for character in alphabet if not character.isspace()]
    learner = fresh(None)
    trainer = trainers.WordPieceTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[*BERT_SPECIALS, *inside],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    tokenizer = fresh(learner.get_vocab())
    tokenizer.add_special_tokens(BERT_SPECIALS)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return tokenizer


def save_tokenizer(tokenizer: tokenizers.Tokenizer, config: Config, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json for `transformers`."""
    if isinstance(config, GPT2Config):
        about = {"tokenizer_class": "GPT2Tokenizer", "bos_token": END, "eos_token": END, "unk_token": END}
    else:
        about = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
        about |= {f"{token[1:-1].lower()}_token": token for token in BERT_SPECIALS}
    about["model_max_length"] = config.n_positions
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def separator(tokenizer: tokenizers.Tokenizer, config: Config) -> int:
    """Returns the id of the token between texts."""
    return tokenizer.token_to_id(END if isinstance(config, GPT2Config) else "[SEP]")


def token_stream(tokenizer: tokenizers.Tokenizer, config: Config, texts: list[str]) -> np.ndarray:
    """Returns the ids of all texts in one row, with a separator after each."""
    end = separator(tokenizer, config)
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return np.concatenate([np.array([*encoding.ids, end], np.int32) for encoding in encodings])
