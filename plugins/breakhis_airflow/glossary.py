"""Explains metrics, terms and pictures of the review pages to people who have never met them."""

METRIC_MEANINGS = {
    "roc_auc": "How well the model ranks malignant images above benign ones: 1 is perfect, 0.5 is guessing.",
    "roc_auc_ovr": "How well each subtype is ranked above all others, on average: 1 is perfect, 0.5 is guessing.",
    "pr_auc": "How few false alarms there are for the malignant images that are found: 1 is perfect.",
    "pr_auc_ovr": "How few false alarms there are for each subtype against all others, on average: 1 is perfect.",
    "recall": "Of the images that are malignant, the share that the model calls malignant.",
    "specificity": "Of the images that are benign, the share that the model calls benign.",
    "precision": "Of the images that the model calls malignant, the share that are.",
    "f1": "Balance of recall and precision of malignant: 1 is perfect.",
    "macro_f1": "Balance of recall and precision, each class counting the same however rare: 1 is perfect.",
    "micro_f1": "Share of images with the right label.",
    "weighted_f1": "Balance of recall and precision, classes counting by their number of images.",
    "accuracy": "Share of images with the right label.",
    "balanced_accuracy": "Share of images with the right label, each class counting the same.",
    "mcc": "Agreement of labels and truth, corrected for chance: 1 is perfect, 0 is chance.",
    "brier": "Mean squared distance of the probabilities from the truth: 0 is perfect.",
    "ece": "How far probabilities are from how often they come true: 0 is perfect.",
    "threshold": "The probability from which an image is called malignant. It was locked before the test.",
    "patient_recognition_rate": "For each patient the share of images with the right label; the mean of that.",
}
"""The meaning of each metric."""

SUBTYPE_METRIC_MEANINGS = {
    "recall": "Of the images of a subtype, the share that the model recognises; the mean over subtypes.",
    "precision": "Of the images that the model gives a subtype, the share that have it; the mean over subtypes.",
}
"""The meaning of metrics that is another for the model of subtypes."""

TERMS = {
    "candidate": "The new version of the model, which is used only if it is approved.",
    "champion": "The version of the model that is in use now.",
    "case": "What one case number stands for, mostly one patient. All images of a case are on the same side, so that "
    "no model is tested on a patient it has learnt from.",
    "gate": "Something that a new version has to reach before anybody is asked: a limit set beforehand.",
    "policy": "The file that says what the gates are. It was fixed before this model was trained.",
    "limit": "The value that has to be reached, or, of errors, not to be exceeded.",
    "inside by": "How far the value is on the right side of the limit; negative is beyond it.",
    "interval": "The range that the value could have had with other patients of the same kind: 95 of 100 such draws "
    "fall into it. With few patients it is wide.",
    "out of fold": "The model is trained several times, each time without some of the cases, and asked about those. "
    "So every case counts, and none was learnt from.",
    "test side": "Cases that were locked away before the first training. No model has learnt from them.",
    "validation side": "Cases on which choices were made, such as when to stop training.",
    "train side": "Cases that the model has learnt from.",
    "margin": "How much worse than the champion counts as no worse. It is set in the policy.",
    "difference": "Candidate less champion on the very same images: above 0 the candidate is better.",
    "at least": "The difference as low as it could be, since other patients would have given another one. The gate "
    "is passed if that is above the margin, with a minus sign.",
    "size": "How often a model that is worse by the whole margin would get through all the same. It should be at "
    "most 5%.",
    "power": "How often a model that is just as good as the champion would get through. Where it is low there are "
    "too few cases to tell, and passing or failing says little.",
    "recall": "Of the images of this class, the share that the model recognises.",
    "precision": "Of the images that the model puts into this class, the share that belongs there.",
    "cases recognised": "A case counts as recognised if the mean of what the model says of its images is right.",
    "Grad-CAM": "A map of the parts of an image that speak for the model's answer. It shows where the model looks, "
    "not whether it is right.",
    "split ledger": "The list of which case is on which side. Cases are only ever added: none changes its side, so "
    "that versions can be compared.",
    "recipe": "The settings of the training: how the network is built, and how long and how it learns.",
    "seed": "The number from which all chance in the training comes. The same seed makes the same model again.",
    "backbone weights": "What the network has learnt from everyday pictures before it saw any tissue.",
    "dataset": "The exact list of images; another image or label makes another dataset.",
    "relabelled": "In both, but now under another tumour type or another case.",
    "MLflow": "The system in which trainings and models are kept.",
    "evidence": "Everything that was measured of a version, under a code that changes if anything in it does.",
    "audit log": "The record of who decided what, when and why. Nobody can change it without being noticed.",
    "magnification": "Of the microscope's objective and ocular: 40, 100, 200 or 400 times.",
    "source": "Where images came from, such as a data set or a clinic.",
    "subtype": "One of eight kinds of tumour; benign and malignant are four each.",
}
"""The meaning of each term of the field."""

PICTURES = (
    (
        "roc",
        "Telling one class from the others (ROC)",
        "Higher and further left is better; the band is what other patients could have given.",
    ),
    ("precision_recall", "False alarms (precision and recall)", "Higher and further right is better."),
    ("reliability", "Can the probabilities be believed?", "On the dotted line, 80% means right in 8 of 10 cases."),
    ("confusion_matrix", "What is taken for what", "Rows are the truth, columns what the model says."),
    ("per_class", "Each class, drawn", "How much of it is found, and how balanced that is."),
    ("slices", "Each magnification, source and subtype, drawn", "A model should not lean on one of them."),
    ("worst_patients", "Patients with the most errors", "Where to look first."),
    ("errors", "The surest errors", "Images of the wrong label that the model was surest of."),
    (
        "grad_cam",
        "Where the model looks (Grad-CAM)",
        "Bright is what speaks for the answer. Beside it a control that has learnt nothing: where both look alike, the "
        "map says nothing.",
    ),
)
"""Pictures in the page's order: file name, title, and how to read it."""
