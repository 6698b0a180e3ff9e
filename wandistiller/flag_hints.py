"""What a flag is called here that a person typed by the name it has in another trainer, or misspelt. Standard library only."""

import difflib
import reprlib

# A flag here, and what kohya's scripts, musubi-tuner, ai-toolkit, diffusers' examples and Wan's generate.py call it. Of several that
# share a name a command has the first that it knows.
OTHER_NAMES = {
    "lr": "learning_rate unet_lr base_lr",
    "max_steps": "steps max_train_steps train_steps num_train_steps num_steps iterations",
    "num_epochs": "epochs num_train_epochs max_train_epochs",
    "num_inference_steps": "steps infer_steps inference_steps sampling_steps sample_steps num_sampling_steps",
    "teacher_steps": "num_inference_steps infer_steps inference_steps sampling_steps sample_steps num_sampling_steps",
    "teacher_sampler": "sampler sample_solver solver sampler_name",
    "batch_size": "train_batch_size batch per_device_train_batch_size",
    "grad_accum_steps": "gradient_accumulation_steps gradient_accumulation accumulate_grad_batches",
    "dtype": "mixed_precision precision weight_dtype",
    "teacher_dtype": "fp8 fp8_base fp8_scaled quantize",
    "teacher_offload": "offload cpu_offload offload_model low_vram",
    "optimizer": "optimizer_type use_8bit_adam use_8bit_optimizer",
    "lr_scheduler": "scheduler lr_scheduler_type",
    "lr_warmup_steps": "warmup_steps lr_warmup",
    "weight_decay": "adam_weight_decay",
    "lora_rank": "rank network_dim lora_dim",
    "lora_alpha": "alpha network_alpha",
    "ema_decay": "use_ema ema ema_rate",
    "shift": "flow_shift discrete_flow_shift sample_shift timestep_shift",
    "guidance_scale": "guidance cfg cfg_scale guide_scale sample_guide_scale",
    "save_every": "checkpointing_steps save_steps save_every_n_steps save_every_n_epochs save_interval",
    "keep_checkpoints": "checkpoints_total_limit save_total_limit max_step_saves_to_keep",
    "sample_every": "validation_steps sample_every_n_steps sample_steps_interval",
    "num_samples": "num_images num_images_per_prompt num_validation_images num_videos",
    "num_seeds": "num_images num_images_per_prompt num_validation_images num_videos",
    "num_images": "num_images_per_prompt num_videos",
    "sample_prompts": "validation_prompt validation_prompts",
    "data_path": "prompts prompt_file prompt_path from_file captions dataset dataset_name dataset_config dataset_path data data_dir "
    "train_data_dir instance_data_dir",
    "prompts_file": "prompts prompt_file prompt_path from_file captions validation_prompt validation_prompts sample_prompts",
    "student": "model_path ckpt checkpoint checkpoint_path student_path",
    "teacher_path": "pretrained_model_name_or_path pretrained_model name_or_path base_model dit ckpt_dir teacher model_path",
    "vae_path": "vae vae_model",
    "text_encoder_path": "t5 text_encoder text_encoder1 tokenizer",
    "report": "report_to log_with logging_dir use_wandb wandb tracker",
    "output": "save_path save_dir save_file output_path output_folder output_name out",
    "output_dir": "save_path save_dir save_file output_path output_folder output_name out",
    "config": "config_file config_path",
    "student_config": "config model_config config_file",
    "shard": "fsdp deepspeed use_fsdp",
    "compile": "torch_compile compile_model dynamo_backend",
}
# What has no flag of its own here, and what to do instead.
NO_FLAG = {
    "blocks_to_swap block_swap group_offload": "here it is called --teacher_offload blocks, where a command trains",
    "distributed multi_gpu num_processes num_gpus gpus": "several GPUs take torchrun --nproc_per_node N, and --shard splits the models",
    "resume resume_from resume_from_checkpoint": "a run resumes where the same command is typed again",
    "resolution size image_size video_size": 'the size of the pictures is "image_size" in the file of --student_config; '
    "generate_images.py takes --height and --width, evaluate_student.py --size",
    "lora lora_path lora_weight lora_weights network_weights": "a LoRA of the teacher is --teacher_lora FILE[:SCALE]",
    "network_module": "a LoRA of a trained student, for what a LoRA of its teacher changes, is --train lora of train_distillation.py",
    "hidden_size depth num_layers num_heads ffn_dim patch_size text_max_length": "it is no flag but a line in the file of "
    "--student_config",
    "num_frames frame_num video_length": "a student draws single pictures",
    "nproc_per_node nnodes node_rank master_addr master_port rdzv_endpoint local_rank": "it is a flag of torchrun, and comes before "
    "the name of the script",
}


def unknown_flag(given: str, known: list[str]) -> str:
    """Return a message for an argument that a command of `known` flags does not know."""
    if not given.startswith("-"):
        return f"unexpected argument {given!r}; every value follows a --flag"
    flag = given.split("=")[0]
    name = flag.removeprefix("--")
    ours = [(f"--{theirs}", f"--{our}") for our, names in OTHER_NAMES.items() for theirs in names.split()]
    renamed = {theirs: our for theirs, our in reversed(ours) if our in known}
    instead = [what for names, what in NO_FLAG.items() if name in names.split()]
    near = difflib.get_close_matches(flag, [*known, *renamed], 1, 0.65)
    if flag in renamed:
        answer = f"here it is called {renamed[flag]}"
    elif instead:
        answer = instead[0]
    else:
        answer = f"did you mean {renamed.get(near[0], near[0])}?" if near else "see --help"
    return f"unknown flag {reprlib.repr(flag)[1:-1]}; {answer}"
