"""The names that every table of the project uses: classes, modalities, collections, splits."""

LABELS = ("covid19", "normal", "tuberculosis")
LABEL_NAMES = {"covid19": "COVID-19", "normal": "Normal", "tuberculosis": "Tuberculosis"}
UNPARSED = "unparsed"  # a free-text answer that names no class, or several: always wrong

MODALITIES = ("ct", "xray")
MODALITY_NAMES = {"ct": "CT", "xray": "X-ray"}
COLLECTIONS = ("ct_slices", "ct_volumes", "xrays")
COLLECTION_NAMES = {"ct_slices": "CT slices", "ct_volumes": "CT volumes", "xrays": "X-rays"}
SPLITS = ("train", "val", "test")
