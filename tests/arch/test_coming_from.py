"""docs/coming-from.md is complete and true: every option has an answer, every flag in an answer exists.

The lists of options are facts of those programs, kept here so that a row cannot fall out unnoticed.
Source: Wan-Video/Wan2.1 and Wan2.2 generate.py; kohya-ss/musubi-tuner src/musubi_tuner/wan_*.py (0.3.4);
modelscope/DiffSynth-Studio diffsynth/pipelines/wan_video.py and core/loader/config.py (2.1), v1.1.9 for the VRAM call.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from cli_words import FLAGS, HEADS, REQUEST_FLAGS, SHORT_NAMES
from kinema.schema import Request

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "coming-from.md").read_text()
REASONS = ("not yet: ", "not needed: ", "by design: ")

CACHE_TEXT = "dataset_config device batch_size num_workers skip_existing keep_cache t5 fp8_t5"

OPTIONS = {
    "Wan 2.2": """
        task size frame_num ckpt_dir offload_model ulysses_size t5_fsdp dit_fsdp t5_cpu save_file prompt
        use_prompt_extend prompt_extend_method prompt_extend_model prompt_extend_target_lang base_seed image
        sample_solver sample_steps sample_shift sample_guide_scale convert_model_dtype
        src_root_path refert_num replace_flag use_relighting_lora
        audio num_clip pose_video start_from_ref infer_frames enable_tts tts_prompt_audio tts_prompt_text tts_text""",
    "Wan 2.1, where it differs": "ring_size src_video src_mask src_ref_images first_frame last_frame",
    "Animate preprocessing (preprocess_data.py)": """
        ckpt_path video_path refer_path save_path resolution_area fps replace_flag retarget_flag use_flux
        iterations k w_len h_len""",
    "wan_generate_video.py": """
        ckpt_dir task sample_solver dit dit_high_noise force_v2_1_time_embedding offload_inactive_dit lazy_loading
        disable_numpy_memmap vae vae_dtype vae_cache_cpu t5 fp8_t5 clip lora_weight lora_multiplier
        lora_weight_high_noise lora_multiplier_high_noise include_patterns exclude_patterns save_merged_model lycoris
        prompt negative_prompt video_size video_length fps infer_steps save_path seed cpu_noise timestep_boundary
        guidance_scale guidance_scale_high_noise video_path image_path end_image_path control_path one_frame_inference
        control_image_path control_image_mask_path trim_tail_frames cfg_skip_mode cfg_apply_ratio
        slg_layers slg_scale slg_start slg_end slg_mode flow_shift fp8 fp8_scaled fp8_fast device attn_mode
        blocks_to_swap use_pinned_memory_for_block_swap output_type no_metadata latent_path
        compile compile_args compile_backend compile_mode compile_dynamic compile_fullgraph compile_cache_size_limit
        from_file interactive""",
    "Short names in prompt files": "w h f d s g l fs i ei cn n ci cim of",
    "wan_cache_latents.py": """
        dataset_config vae vae_dtype device batch_size num_workers skip_existing keep_cache debug_mode console_width
        console_back console_num_images disable_cudnn_backend vae_cache_cpu i2v clip one_frame""",
    "wan_cache_text_encoder_outputs.py": CACHE_TEXT,
    "wan_train_network.py": """
        task fp8_scaled t5 fp8_t5 clip vae_cache_cpu one_frame force_v2_1_time_embedding dit_high_noise
        timestep_boundary offload_inactive_dit
        config_file dataset_config sdpa flash_attn sage_attn xformers flash3 split_attn
        compile compile_backend compile_mode compile_dynamic compile_fullgraph compile_cache_size_limit
        cuda_allow_tf32 cuda_cudnn_benchmark dynamo_backend dynamo_mode dynamo_fullgraph dynamo_dynamic
        max_train_steps max_train_epochs max_data_loader_n_workers persistent_data_loader_workers seed
        gradient_checkpointing gradient_checkpointing_cpu_offload gradient_accumulation_steps mixed_precision
        save_precision fp8_base blocks_to_swap use_pinned_memory_for_block_swap block_swap_h2d_only
        block_swap_ring_size img_in_txt_in_offloading disable_numpy_memmap
        optimizer_type optimizer_args learning_rate max_grad_norm lr_scheduler lr_warmup_steps lr_decay_steps
        lr_scheduler_num_cycles lr_scheduler_power lr_scheduler_timescale lr_scheduler_min_lr_ratio
        lr_scheduler_type lr_scheduler_args
        timestep_sampling discrete_flow_shift sigmoid_scale weighting_scheme logit_mean logit_std mode_scale
        min_timestep max_timestep preserve_distribution_shape num_timestep_buckets show_timesteps guidance_scale
        network_module network_dim network_alpha network_dropout network_args network_weights dim_from_weights
        scale_weight_norms base_weights base_weights_multiplier training_comment no_metadata
        output_dir output_name resume save_every_n_epochs save_every_n_steps save_last_n_epochs save_last_n_steps
        save_last_n_epochs_state save_last_n_steps_state save_state save_state_on_train_end
        sample_prompts sample_every_n_steps sample_every_n_epochs sample_at_first
        logging_dir log_with log_prefix log_tracker_name log_tracker_config wandb_run_name wandb_api_key log_config
        huggingface_repo_id huggingface_repo_type huggingface_path_in_repo huggingface_token
        huggingface_repo_visibility save_state_to_huggingface resume_from_huggingface async_upload
        metadata_title metadata_author metadata_description metadata_license metadata_tags metadata_reso
        metadata_arch ddp_timeout ddp_gradient_as_bucket_view ddp_static_graph dit vae vae_dtype""",
    "WanVideoPipeline.from_pretrained": """
        torch_dtype device model_configs tokenizer_config audio_processor_config redirect_common_files use_usp
        vram_limit""",
    "ModelConfig": """
        path model_id origin_file_pattern download_source local_model_path skip_download
        offload_dtype offload_device onload_dtype onload_device preparing_dtype preparing_device
        computation_dtype computation_device clear_parameters""",
    "pipe.enable_vram_management": "num_persistent_param_in_dit vram_limit vram_buffer",
    "pipe(...)": """
        prompt negative_prompt input_image end_image input_video denoising_strength input_audio audio_embeds
        audio_sample_rate s2v_pose_video s2v_pose_latents motion_video control_video reference_image
        camera_control_direction camera_control_speed camera_control_origin
        vace_video vace_video_mask vace_reference_image vace_scale
        animate_pose_video animate_face_video animate_inpaint_video animate_mask_video
        animate2_prompt_ref animate2_reference_image animate2_reference_video animate2_refert_images
        animate2_offload_kv animate2_log_scale vap_video vap_prompt negative_vap_prompt
        seed rand_device height width num_frames cfg_scale cfg_merge switch_DiT_boundary num_inference_steps
        sigma_shift motion_bucket_id longcat_video tiled tile_size tile_stride
        sliding_window_size sliding_window_stride tea_cache_l1_thresh tea_cache_model_id
        wantodance_music_path wantodance_reference_image wantodance_fps wantodance_keyframes
        wantodance_keyframes_mask framewise_decoding progress_bar_cmd output_type""",
}
"""Heading of a table -> the options it must hold."""


def tables(page: str) -> dict[str, list[tuple[list[str], str]]]:
    """Return {heading: [(options, answer)]}; options without dashes."""
    found: dict[str, list[tuple[list[str], str]]] = {}
    heading = ""
    for line in page.splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("|") and not line.startswith(("| Option", "|---")):
            cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            option, answer = cells[0], " | ".join(cells[1:])
            found.setdefault(heading, []).append((re.findall(r"`(?:--)?([^`]+)`", option), answer.strip()))
    return found


def catalog_takes() -> set[str]:
    """Return the media fields that some model of the catalog takes."""
    catalog = tomllib.loads((ROOT / "src/kinema/catalog/models.toml").read_text())
    return {field for entry in catalog["models"].values() for field in entry.get("takes", ())}


def media_fields() -> set[str]:
    def group(field) -> str | None:
        return (field.json_schema_extra or {}).get("group")

    return {name for name, field in Request.model_fields.items() if group(field) == "media"}


def faults(page: str) -> list[str]:
    """Return what is missing, unanswered or untrue on the page."""
    rows = tables(page)
    lines = [f"no such table is expected: {heading}" for heading in rows if heading not in OPTIONS]
    for heading, names in OPTIONS.items():
        listed = [name for options, _ in rows.get(heading, ()) for name in options]
        lines += [f"{heading}: {name} has no row" for name in names.split() if name not in listed]
        lines += [f"{heading}: {name} is no option there" for name in listed if name not in names.split()]
        lines += [f"{heading}: {name} stands twice" for name in sorted(set(listed)) if listed.count(name) > 1]
        for options, answer in rows.get(heading, ()):
            lines += [f"{heading}, {' '.join(options)}: {fault}" for fault in _answer_faults(answer)]
    return lines


def _answer_faults(answer: str) -> list[str]:
    equivalent = re.match(r"`(--[a-z0-9-]+|kinema [a-z]+)", answer)
    if not equivalent and not any(answer.startswith(reason) and len(answer) > len(reason) for reason in REASONS):
        return ["the answer begins neither with a flag, a command, nor with " + ", ".join(REASONS)]
    named = re.findall(r"`(--[a-z0-9-]+)", answer)
    lines = [f"{flag} does not exist" for flag in named if flag not in FLAGS]
    lines += [f"kinema {verb} does not exist" for verb in re.findall(r"`kinema ([a-z]+)", answer) if verb not in HEADS]
    if equivalent:
        idle = media_fields() - catalog_takes()
        lines += [f"{flag} is claimed, but no model takes it" for flag in named if flag[2:].replace("-", "_") in idle]
    return lines


def test_the_page_is_complete_and_true():
    assert faults(PAGE) == []


def test_short_names_stand_for_the_fields_the_page_says():
    for options, answer in tables(PAGE)["Short names in prompt files"]:
        for name in options:
            assert f"`--{SHORT_NAMES[name].replace('_', '-')}" in answer, name


def test_short_names_are_those_that_prompt_files_know():
    from kinema.batch.lines import SHORT_NAMES as KNOWN

    fields = {name: "size" if field in ("width", "height") else field for name, field in KNOWN.items()}
    assert fields == {**fields, **SHORT_NAMES}


def test_every_short_name_stands_for_a_field():
    assert set(SHORT_NAMES.values()) <= set(Request.model_fields)
    assert "--dit-high" in REQUEST_FLAGS


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("| `--sample_steps` | `--steps` |\n", ""),
        ("| `--sample_steps` | `--steps` |", "| `--sample_steps` | |"),
        ("| `--sample_steps` | `--steps` |", "| `--sample_steps` | not yet: |"),
        ("| `--sample_steps` | `--steps` |", "| `--sample_steps` | `--num-steps` |"),
        ("| `--sample_steps` | `--steps` |", "| `--sample_stepz` | `--steps` |"),
        ("`kinema decode FILE`", "`kinema undo FILE`"),
    ],
)
def test_a_planted_fault_is_caught(old: str, new: str):
    assert old in PAGE
    assert faults(PAGE.replace(old, new))


def test_a_flag_that_no_model_takes_is_caught(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(globals(), "catalog_takes", set)
    assert any("--control" in fault for fault in faults(PAGE))
