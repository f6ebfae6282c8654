"""The names that every table of the project uses: classes, modalities, collections, splits."""

LABELS = ("covid19", "normal", "tuberculosis")
LABEL_NAMES = {"covid19": "COVID-19", "normal": "Normal", "tuberculosis": "Tuberculosis"}
UNPARSED = "unparsed"  # a free-text answer that names no class, or several: always wrong

MODALITIES = ("ct", "xray")
COLLECTIONS = ("ct_slices", "ct_volumes", "xrays")
COLLECTION_NAMES = {"ct_slices": "CT slices", "ct_volumes": "CT volumes", "xrays": "X-rays"}
SPLITS = ("train", "val", "test")

SYSTEMS = ("zeroshot_qwen", "zeroshot_siglip", "finetune_siglip")
SYSTEM_NAMES = {
    "zeroshot_qwen": "Qwen2.5-VL, zero-shot",
    "zeroshot_siglip": "SigLIP, zero-shot",
    "finetune_siglip": "SigLIP, fine-tuned",
}
