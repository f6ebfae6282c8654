"""Names that all tables use: classes, modalities, collections and splits."""

LABELS = ("covid19", "normal", "tuberculosis")
LABEL_NAMES = {"covid19": "COVID-19", "normal": "Normal", "tuberculosis": "Tuberculosis"}
UNPARSED = "unparsed"  # a free-text answer that names no class, or several: always wrong

MODALITIES = ("ct", "xray")
MODALITY_NAMES = {"ct": "CT", "xray": "X-ray"}
DISEASES = {"ct": "covid19", "xray": "tuberculosis"}  # told apart from normal in each modality

COLLECTIONS = ("ct_slices", "ct_volumes", "xrays")
COLLECTION_NAMES = {"ct_slices": "CT slices", "ct_volumes": "CT volumes", "xrays": "X-rays"}

SPLITS = ("train", "val", "test", "external")
EVALUATED = ("test", "external")  # splits that metrics are computed on
