"""Keys of `config.json` that do not change what this package computes: for training, heads and text generation.

Every other key is used, refused or warned of; see `Config.parse`.
"""

# For any model: its origin, how transformers loads it, which outputs it returns.
_ANY = """
_attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash _experts_implementation
_experts_implementation_internal _name_or_path _num_labels architectures attn_implementation chunk_size_feed_forward
dtype finetuning_task gradient_checkpointing id2label is_encoder_decoder label2id model_type name_or_path num_labels
output_attentions output_hidden_states output_past problem_type return_dict task_specific_params tf_legacy_loss
tie_encoder_decoder tie_last_hidden_states tokenizer_class torch_dtype torchscript transformers.js_config
transformers_version use_bfloat16 use_cache xla_device
"""
# For text generation and for training on several tasks; older versions of transformers wrote them too.
_GENERATION = """
assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens bos_token_id cls_token_id
cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample early_stopping
encoder_no_repeat_ngram_size encoder_repetition_penalty eos_token_id epsilon_cutoff eta_cutoff
exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty mask_token_id max_length
min_length no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams
num_return_sequences output_scores pad_token_id prefix remove_invalid_values repetition_penalty
return_dict_in_generate sep_token_id suppress_tokens target_lookbehind temperature top_k top_p typical_p
unk_token_id
"""
_GPT2 = """
attn_pdrop embd_pdrop is_decoder n_ctx n_special predict_special_tokens resid_pdrop summary_activation
summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
"""
_BERT = """
attention_probs_dropout_prob classifier_dropout directionality hidden_dropout_prob pooler_fc_size
pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type
"""

_DISTILBERT = """
attention_dropout dropout qa_dropout seq_classif_dropout sinusoidal_pos_embds
"""

ANY = frozenset((_ANY + _GENERATION).split())
GPT2 = ANY | frozenset(_GPT2.split())
BERT = ANY | frozenset(_BERT.split())
DISTILBERT = ANY | frozenset(_DISTILBERT.split())
