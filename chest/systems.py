"""What is compared, and how it is named: systems, floors, probes."""

# What is compared: three models, and two floors that look at no image.
SYSTEMS = (
    "zeroshot_qwen",
    "zeroshot_siglip",
    "finetune_siglip",
    "floor_modality",
    "floor_site",
)
TRAINED = "finetune_siglip"  # the one that is trained, probed, and told of in the model card
SYSTEM_NAMES = {
    "zeroshot_qwen": "Qwen2.5-VL, zero-shot",
    "zeroshot_siglip": "SigLIP, zero-shot",
    "finetune_siglip": "SigLIP, fine-tuned",
    "floor_modality": "Floor: modality's commonest class",
    "floor_site": "Floor: site's commonest class",
}

# The fine-tuned model on images of which a part is hidden (chest/regions.py says which).
PROBES = ("lungs_hidden", "border_only", "lungs_only")
PROBE_NAMES = {
    "everything": "Everything visible",
    "lungs_only": "Lungs' region only",
    "lungs_hidden": "Lungs hidden",
    "border_only": "Border only",
}
