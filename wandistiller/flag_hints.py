"""What a flag is called here that a person typed by the name it has in another trainer, or misspelt. Standard library only."""

import difflib
import reprlib

from wandistiller.command_line import is_one_command

# These are torchrun's own flags; they come here when it is left out or another launcher is used.
LAUNCHER_FLAGS = {"nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port", "rdzv_endpoint", "local_rank"}
# What kohya's scripts, musubi-tuner, ai-toolkit, diffusers' examples and Wan's generate.py call the flags of these commands. A
# command has the first of the names that it knows; after a colon stands what is answered where it knows the name before it.
OTHER_NAMES = {
    "learning_rate unet_lr base_lr": ["lr"],
    "steps max_train_steps train_steps num_train_steps num_steps iterations": ["max_steps", "num_inference_steps"],
    "epochs num_train_epochs max_train_epochs": ["num_epochs"],
    "infer_steps inference_steps sampling_steps sample_steps num_sampling_steps": [
        "num_inference_steps",
        "teacher_steps",
    ],
    "num_inference_steps teacher_num_inference_steps": ["teacher_steps"],
    "sampler sample_solver solver sampler_name": ["teacher_sampler"],
    "guidance_interval cfg_interval guidance_start guidance_end": ["guidance_range"],
    "train_batch_size batch per_device_train_batch_size": ["batch_size"],
    "gradient_accumulation_steps gradient_accumulation accumulate_grad_batches": ["grad_accum_steps"],
    "mixed_precision precision weight_dtype": ["dtype"],
    "fp8 fp8_base fp8_scaled quantize": ["teacher_dtype"],
    "blocks_to_swap offload cpu_offload offload_model low_vram": ["teacher_offload"],
    "optimizer_type use_8bit_adam use_8bit_optimizer": ["optimizer"],
    "scheduler lr_scheduler_type": ["lr_scheduler"],
    "warmup_steps lr_warmup": ["lr_warmup_steps"],
    "adam_weight_decay": ["weight_decay"],
    "use_ema ema ema_rate": ["ema_decay"],
    "flow_shift discrete_flow_shift sample_shift timestep_shift": ["shift"],
    "guidance cfg cfg_scale guide_scale sample_guide_scale": ["guidance_scale"],
    "checkpointing_steps save_steps save_every_n_steps save_every_n_epochs save_interval": ["save_every"],
    "checkpoints_total_limit save_total_limit max_step_saves_to_keep": ["keep_checkpoints"],
    "validation_steps sample_every_n_steps sample_steps_interval": ["sample_every"],
    "num_images num_images_per_prompt num_validation_images num_videos": [
        "num_samples",
        "num_seeds",
        "num_images",
    ],
    "validation_prompt validation_prompts sample_prompts": ["eval_prompts", "prompts_file"],
    "prompts prompt_file prompt_path from_file captions": ["data_path", "prompts_file"],
    "dataset dataset_name dataset_config dataset_path data data_dir train_data_dir instance_data_dir": ["data_path"],
    "pretrained_model_name_or_path pretrained_model name_or_path base_model dit ckpt_dir teacher": ["teacher_path"],
    "model_path ckpt checkpoint checkpoint_path student_path": ["student", "teacher_path"],
    "vae vae_model": ["vae_path"],
    "t5 text_encoder text_encoder1 tokenizer": ["text_encoder_path"],
    "report_to log_with logging_dir use_wandb wandb tracker": ["report"],
    "save_path save_dir save_file output_path output_folder output_name out": ["output", "output_dir"],
    "config model_config config_file": ["student_config"],
    "fsdp deepspeed use_fsdp": ["shard"],
    "torch_compile compile_model dynamo_backend": ["compile"],
    "resume resume_from resume_from_checkpoint": ["save_every: a run resumes where the same command is typed again"],
    "resolution size image_size video_size": [
        "height: the size of the pictures is --height and --width",
        'student_config: the size of the pictures is "image_size" in the file of --student_config',
        "student: the size of the pictures is the one that the student was trained at",
    ],
    "lora lora_path lora_weight lora_weights network_weights": [
        "lora",
        "student: projection_mapper.py --lora cuts a LoRA for a student, which diffusers and ComfyUI load onto its export",
        "teacher_lora: a LoRA of the teacher is --teacher_lora FILE[:SCALE]; the student is trained whole",
    ],
    "lora_rank rank network_dim network_alpha network_module": [
        "student_config: no LoRA is trained here; all weights of the student are trained",
        "student: no LoRA is trained here; a student is a whole model",
    ],
    "hidden_size depth num_layers num_heads ffn_dim patch_size text_max_length": [
        "student_config: it is no flag but a line in the file of --student_config"
    ],
    "num_frames frame_num video_length": [
        "student: a student draws single pictures",
        "student_config: a student draws single pictures",
    ],
}


def unknown_flag(given: str, others: list[str], known: list[str], prog: str) -> str:
    """Return a message for an argument that a command does not know.

    Args:
        others: the arguments behind it that are not known either.
        known: the flags of the command, as --name.
    """
    if not given.startswith("-"):
        return f"unexpected argument {given!r}; every value follows a --flag"
    flag = given.split("=")[0]
    if flag.removeprefix("--") in LAUNCHER_FLAGS:
        value = f" {others[0]}" if "=" not in given and others and not others[0].startswith("-") else ""
        return f"{flag} is a flag of torchrun: torchrun {given}{value} {'-m ' * is_one_command()}{prog} ..."
    return f"unknown flag {reprlib.repr(flag)[1:-1]}; {_suggestion(flag, known)}"


def _suggestion(flag: str, known: list[str]) -> str:
    """Return what to type instead: the name here of another trainer's flag, else the flag that is spelt most alike."""
    for names, ours in OTHER_NAMES.items():
        for our, _, answer in (our.partition(": ") for our in ours if flag.removeprefix("--") in names.split()):
            if f"--{our}" in known:
                return answer or f"here it is called --{our}"
    near = difflib.get_close_matches(flag, known, 1, 0.65)
    return f"did you mean {near[0]}?" if near else "see --help"
