"""RoBERTa: BERT's blocks, with positions that begin after the padding index; XLM-RoBERTa and CamemBERT too.

Source: Liu et al. 2019, and the layout of Hugging Face's `roberta-*`, `xlm-roberta-*` and `camembert-*` checkpoints.
"""

import dataclasses
from typing import Any, ClassVar

from jaxqkv.architectures.bert import BertConfig
from jaxqkv.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class RobertaConfig(BertConfig):
    """RoBERTa's sizes and settings.

    The first token has position `pad_token_id` + 1, so that a text has at most `n_positions` tokens, that many fewer
    than the position embedding has rows (max_position_embeddings in `config.json`).
    """

    pad_token_id: int = 1

    model_type = "roberta"
    keys: ClassVar = {**BertConfig.keys, "pad_token_id": "pad_token_id"}
    usual: ClassVar = {
        **BertConfig.usual,
        "vocab_size": 50265,
        "pad_token_id": 1,
    }
    always: ClassVar = {"architectures": ["RobertaModel"], "position_embedding_type": "absolute"}

    tokenizer_class = "RobertaTokenizer"
    counterpart = BertConfig.counterpart._replace(
        config="RobertaConfig", model="RobertaModel", head_model=("RobertaForMaskedLM", "roberta")
    )
    prefix = "roberta."
    heads = r"(pooler|lm_head|classifier|qa_outputs)\..*"
    decoder = "lm_head.decoder.weight"
    masked_keys = ("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias")
    masked_activation = "gelu"

    @classmethod
    def settle(cls, values: dict[str, Any], where: str) -> dict[str, Any]:
        """Returns the fields with `n_positions` counted from the first position that a token can have."""
        rows, pad = values["n_positions"], values["pad_token_id"]
        if rows <= pad + 1:
            raise CheckpointError(
                f"{where}: max_position_embeddings = {rows} leaves no position after pad_token_id = {pad}"
            )
        return values | {"n_positions": rows - pad - 1}

    def to_json(self) -> dict[str, Any]:
        """Returns the object that `config.json` holds; its positions include those that belong to no token."""
        return super().to_json() | {"max_position_embeddings": self.position_rows}

    @property
    def first_position(self) -> int:
        """The row of the position embedding for a text's first token; the rows before belong to no token."""
        return self.pad_token_id + 1

    @property
    def position_rows(self) -> int:
        """Rows of the position embedding."""
        return self.n_positions + self.first_position


@dataclasses.dataclass(frozen=True)
class XLMRobertaConfig(RobertaConfig):
    """XLM-RoBERTa's sizes: RoBERTa's, with another vocabulary."""

    model_type = "xlm-roberta"
    tokenizer_class = "XLMRobertaTokenizer"
    counterpart = RobertaConfig.counterpart._replace(
        config="XLMRobertaConfig", model="XLMRobertaModel", head_model=("XLMRobertaForMaskedLM", "roberta")
    )


@dataclasses.dataclass(frozen=True)
class CamembertConfig(RobertaConfig):
    """CamemBERT's sizes: RoBERTa's, with another vocabulary."""

    model_type = "camembert"
    tokenizer_class = "CamembertTokenizer"
    counterpart = RobertaConfig.counterpart._replace(
        config="CamembertConfig", model="CamembertModel", head_model=("CamembertForMaskedLM", "roberta")
    )


def _sizes(n_embd: int, n_layer: int, n_head: int) -> RobertaConfig:
    return RobertaConfig(
        vocab_size=50265,
        n_positions=512,
        n_embd=n_embd,
        n_layer=n_layer,
        n_head=n_head,
        n_inner=4 * n_embd,
        activation="gelu",
        layer_norm_epsilon=1e-5,
        initializer_range=0.02,
        type_vocab_size=1,
        pad_token_id=1,
    )


# Models whose sizes are known by name.
KNOWN = {"roberta-base": _sizes(768, 12, 12), "roberta-large": _sizes(1024, 24, 16)}
