"""Keys of mlx-lm's, TRL's, transformers' and PEFT's files that are no settings here.

Those that change nothing here are ignored, and told in one line. Those that would change the outcome are refused by
name, but where they ask for what happens here anyway.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def _with_reason(names_by_reason: Mapping[str, str]) -> dict[str, str]:
    return {name: reason for reason, names in names_by_reason.items() for name in names.split()}


IGNORED = _with_reason(
    {
        "": "train use_peft",
        "every step is reported": "steps_per_report logging_steps logging_strategy logging_first_step logging_dir "
        "logging_nan_inf_filter log_level log_level_replica log_on_each_node disable_tqdm "
        "include_num_input_tokens_seen",
        "every held-out row is used": "val_batches test_batches per_device_eval_batch_size eval_accumulation_steps "
        "eval_packing eval_do_concat_batches eval_use_gather_object batch_eval_metrics prediction_loss_only "
        "bf16_full_eval fp16_full_eval include_for_metrics",
        "the held-out part is always judged": "test do_train do_eval do_predict eval_strategy evaluation_strategy "
        "eval_on_start eval_delay",
        "the warm-up climbs from peak / (warmup + 1)": "warmup_init",
        "the state is saved each --save-every steps, over the last one, and no run is overwritten": "save_strategy "
        "save_total_limit save_only_model save_safetensors save_on_each_node overwrite_output_dir",
        "the best of the validated steps is kept anyway": "load_best_model_at_end greater_is_better",
        "nothing is sent anywhere": "push_to_hub hub_model_id hub_strategy hub_token hub_private_repo hub_always_push "
        "hub_revision run_name project project_name wandb trackio_space_id "
        "trackio_bucket_id trackio_static_space_id",
        "weights are held as --frozen says, and no code of a model runs": "torch_dtype bnb_4bit_compute_dtype "
        "attn_implementation use_flash_attention_2 trust_remote_code model_code_revision low_cpu_mem_usage use_cache",
        "speed and memory are the machine's own": "use_liger_kernel liger_kernel_config torch_compile tf32 "
        "torch_compile_backend torch_compile_mode gradient_checkpointing_kwargs activation_offloading padding_free "
        "pad_to_multiple_of group_by_length auto_find_batch_size dataset_num_proc dataset_batch_size "
        "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
        "ddp_timeout ddp_backend ddp_find_unused_parameters local_rank average_tokens_across_devices full_determinism "
        "skip_memory_metrics torch_empty_cache_steps clear_cache_threshold "
        "activation_checkpointing_kwargs gradient_checkpointing_use_reentrant accelerator_config debug "
        "dataloader_multiprocessing_context dataloader_in_order ddp_bucket_cap_mb ddp_broadcast_buffers "
        "ddp_static_graph ignore_bias_buffers enable_jit_checkpoint train_sampling_strategy length_column_name",
        "the order is drawn by --seed, and other columns are left alone": "shuffle_dataset remove_unused_columns "
        "label_names ignore_data_skip restore_callback_states_from_checkpoint",
        "it acts only beside another key": "megatron_core qalora_group_size inference_mode peft_version auto_mapping "
        "runtime_config bnb_4bit_quant_storage pad_token",
    }
)
ELSEWHERE = "write the rows to a file, as with Dataset.to_json, and name it by data"
ONLY: dict[str, tuple[tuple[Any, ...], str]] = {  # key → the values that it may have, and what to do instead
    "training_mode": (("normal", "sft"), "only supervised fine-tuning is known"),
    "peft_type": (("LORA",), "choose another method by method"),
    "task_type": (("CAUSAL_LM",), "only causal language models are known"),
    "lora_task_type": (("CAUSAL_LM",), "only causal language models are known"),
    "metric_for_best_model": (("loss", "eval_loss"), "the best step is that of the lowest validation loss"),
    "use_cpu": ((), "give device"),
    "bias": (("none",), "biases train with method bitfit"),
    "loss_type": (("nll", "chunked_nll"), "the loss is the cross-entropy"),
    "packing_strategy": (("bfd", "ffd"), "no row is cut: take packing or leave it"),
    "truncation_mode": (("keep_start",), "no row is cut: those that are too long are left out"),
    "adam_beta1": ((0.9,), "AdamW has its usual constants"),
    "adam_beta2": ((0.999,), "AdamW has its usual constants"),
    "adam_epsilon": ((1e-8,), "AdamW has its usual constants"),
    "bnb_4bit_quant_type": (("nf4",), "the only 4 bits are NF4's"),
    "dataset_train_split": (("train",), ELSEWHERE),
    "dataset_test_split": (("test", "validation"), ELSEWHERE),
    "lr_scheduler_kwargs": ((), "every schedule ends at 0"),
    "optim_args": ((), "optimisers have their usual constants"),
    "optim_target_modules": ((), "choose modules by target_modules"),
    "layers_to_transform": ((), "give num_layers, the number of last layers"),
    "chat_template": ((), "put it into the model's folder as chat_template.jinja"),
    "chat_template_path": ((), "put it into the model's folder as chat_template.jinja"),
    "eos_token": ((), "change it in the model's tokenizer_config.json"),
    "env": ((), "set variables of the environment in the shell"),
    "data_seed": ((), "give seed, which decides everything random"),
    **dict.fromkeys(
        ("hf_dataset", "datasets", "dataset_mixture", "dataset_config", "dataset_streaming"), ((), ELSEWHERE)
    ),
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config", "parallelism_config"), ((), "one process trains")),
    **dict.fromkeys(
        "neftune_noise_alpha label_smoothing_factor load_in_8bit use_bnb_nested_quant dataset_kwargs model_init_kwargs "
        "fan_in_fan_out layers_pattern layer_replication lora_bias use_qalora use_bdlora loftq_config eva_config "
        "corda_config lora_ga_config velora_config kasa_config monteclora_config arrow_config alora_invocation_tokens "
        "megatron_config trainable_token_indices target_parameters lora_target_parameters dataloader_drop_last "
        "ensure_weight_tying".split(),
        ((), "nothing here does it"),
    ),
}
PEFT_DEFAULTS = {"r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}  # where PEFT's own file is silent


def is_foreign(name: str) -> bool:
    return name in IGNORED or name in ONLY


def is_off(value: Any) -> bool:
    """Whether a value asks for nothing: false, 0, -1, an empty list."""
    return not value or str(value).lower() in ("false", "none", "no", "0", "0.0", "-1")


def reason_to_ignore(name: str, value: Any, where: str) -> str:
    """Why a foreign key changes nothing here; empty if nobody would miss it. ValueError where it would be missed."""
    if name in ("train", "use_peft") and str(value).lower() == "false":
        raise ValueError(f"{where} false: this command trains an adapter; --method full trains all weights")
    if name in ONLY:
        values, instead = ONLY[name]
        if not is_off(value) and str(value) not in map(str, values):
            raise ValueError(f"{where} {value!r} cannot be honoured: {instead}")
        return ""
    return "" if is_off(value) else IGNORED[name]


def ignored_in_words(reasons: Iterable[tuple[str, str]]) -> str:
    """`ignored: logging_steps, log_level (every step is reported); …` for pairs of a name and its reason."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons:
        if reason:
            names.setdefault(reason, []).append(name)
    return "ignored: " + "; ".join(f"{', '.join(same)} ({reason})" for reason, same in names.items()) if names else ""
