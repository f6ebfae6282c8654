"""The names that every table of the project uses: classes, modalities, collections, splits."""

LABELS = ("covid19", "normal", "tuberculosis")
LABEL_NAMES = {"covid19": "COVID-19", "normal": "Normal", "tuberculosis": "Tuberculosis"}
UNPARSED = "unparsed"  # a free-text answer that names no class, or several: always wrong

MODALITIES = ("ct", "xray")
MODALITY_NAMES = {"ct": "CT", "xray": "X-ray"}
COLLECTIONS = ("ct_slices", "ct_volumes", "xrays")
COLLECTION_NAMES = {"ct_slices": "CT slices", "ct_volumes": "CT volumes", "xrays": "X-rays"}
SPLITS = ("train", "val", "test")

# What is compared: three models, and two floors that look at no image.
SYSTEMS = (
    "zeroshot_qwen",
    "zeroshot_siglip",
    "finetune_siglip",
    "floor_modality",
    "floor_site",
)
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
