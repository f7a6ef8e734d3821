"""Which files of a source are images of its manifest, and which are quarantined, with the reason for each."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

from ml.core.taxonomy import find_folder_contradiction, label_of
from ml.data.image_facts import Describe, Facts, SourceFile, Unusable, by_file_name
from ml.data.sources import SourceSpec
from ml.images.file_facts import PictureFacts


class _Named(NamedTuple):
    file: SourceFile
    name: Facts
    picture: PictureFacts


def classify(
    files: list[SourceFile], pictures: dict[str, PictureFacts], spec: SourceSpec, describe: Describe = by_file_name
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, str]], int]:
    """Turn decoded files into manifest rows and quarantine rows.

    In this order: a file that nothing usable is known of; one of an erased patient; a folder that contradicts the name;
    a name whose letter contradicts its subtype; a picture that does not decode; the same name again (the larger picture
    stays, then the first path); an image whose slide the source trusts under another subtype; a slide under two
    subtypes (all its images, since nobody can say which label is right); the same pixels under names of another subtype
    (all of them); the same pixels again (the first stays).

    Returns:
        manifest rows, quarantine rows, what the copies that were left out tie together (see
        :data:`ml.data.manifest.TIE_COLUMNS`), and how many files were one more copy of an image in the manifest.
    """
    quarantine: list[dict[str, Any]] = []
    by_name: dict[str, list[_Named]] = defaultdict(list)
    for one in _usable(files, pictures, spec, describe, quarantine):
        by_name[one.name.key].append(one)
    # max keeps the first of equals, and the files came sorted by path.
    named = [max(copies, key=lambda c: c.picture.width * c.picture.height) for copies in by_name.values()]
    duplicates = sum(len(copies) - 1 for copies in by_name.values())

    by_pixels: dict[str, list[_Named]] = defaultdict(list)
    for one in _of_one_subtype(named, spec, quarantine):
        by_pixels[one.picture.pixel_sha256].append(one)
    rows, ties = [], []
    for same in by_pixels.values():
        if len({one.name.subtype for one in same}) > 1:
            paths = ", ".join(one.file.path for one in same)
            detail = f"the same pixels under names of different subtypes: {paths}"
            quarantine += [quarantine_row(one.file, one.name, spec.name, "conflicting_labels", detail) for one in same]
        else:
            rows.append(_row(same[0], spec))
            duplicates += len(same) - 1
            ties += [tie for other in same[1:] if (tie := _tie(other, same[0], spec))]
    rows.sort(key=lambda row: str(row["path"]))
    quarantine.sort(key=lambda row: str(row["path"]))
    return rows, quarantine, ties, duplicates


def _tie(copy: _Named, kept: _Named, spec: SourceSpec) -> dict[str, str] | None:
    if (copy.name.patient, copy.name.slide) == (kept.name.patient, kept.name.slide):
        return None
    return {
        "pixel_sha256": copy.picture.pixel_sha256,
        "patient": copy.name.patient,
        "slide": copy.name.slide,
        "source": spec.name,
        "path": copy.file.path,
        "kept_patient": kept.name.patient,
        "kept_slide": kept.name.slide,
    }


def _usable(
    files: list[SourceFile],
    pictures: dict[str, PictureFacts],
    spec: SourceSpec,
    describe: Describe,
    quarantine: list[dict[str, Any]],
) -> Iterator[_Named]:
    """The files of which each by itself can be used, by path; the others go to quarantine."""
    for file in sorted(files):
        try:
            name = describe(file.path)
        except Unusable as why:
            quarantine.append(quarantine_row(file, None, spec.name, why.reason, why.detail))
            continue
        if not file.sha256:
            quarantine.append(quarantine_row(file, name, spec.name, "erased", "the patient was erased on request"))
            continue
        picture = pictures[file.sha256]
        if not spec.table and (against := find_folder_contradiction(file.path)):
            quarantine.append(quarantine_row(file, name, spec.name, "folder", against))
        elif name.label != label_of(name.subtype):
            detail = f"the name says {name.label}, but {name.subtype} is {label_of(name.subtype)}"
            quarantine.append(quarantine_row(file, name, spec.name, "label", detail))
        elif picture.reason:
            quarantine.append(quarantine_row(file, name, spec.name, picture.reason, picture.detail))
        else:
            yield _Named(file, name, picture)


def _of_one_subtype(named: list[_Named], spec: SourceSpec, quarantine: list[dict[str, Any]]) -> Iterator[_Named]:
    """The images whose slide stands under one subtype, or that the source trusts; the others go to quarantine."""
    subtypes = defaultdict(set)
    for one in named:
        subtypes[one.name.slide].add(one.name.subtype)
    for one in named:
        slide = one.name.slide
        trusted = spec.trusted(slide)
        if trusted and trusted != one.name.subtype:
            detail = f"{spec.file.name} trusts {trusted} for slide {slide}, and this says {one.name.subtype}"
            quarantine.append(quarantine_row(one.file, one.name, spec.name, "not_trusted", detail))
        elif not trusted and len(subtypes[slide]) > 1:
            detail = f"slide {slide} stands under {' and '.join(sorted(subtypes[slide]))}"
            quarantine.append(quarantine_row(one.file, one.name, spec.name, "slide_with_two_subtypes", detail))
        else:
            yield one


def _row(one: _Named, spec: SourceSpec) -> dict[str, Any]:
    return {
        "path": one.file.path,
        "sha256": one.file.sha256,
        "pixel_sha256": one.picture.pixel_sha256,
        "perceptual_hash": one.picture.perceptual_hash,
        "source": spec.name,
        "cohort": spec.cohort,
        "patient": one.name.patient,
        "slide": one.name.slide,
        "subtype": one.name.subtype,
        "label": one.name.label,
        "magnification": one.name.magnification,
        "seq": one.name.seq,
        "width": one.picture.width,
        "height": one.picture.height,
    }


def quarantine_row(file: SourceFile, name: Facts | None, source: str, reason: str, detail: str) -> dict[str, Any]:
    """A row of quarantine.parquet."""
    return {
        "path": file.path,
        "sha256": file.sha256,
        "source": source,
        "reason": reason,
        "detail": detail,
        "patient": name.patient if name else None,
        "slide": name.slide if name else None,
        "subtype": name.subtype if name else None,
        "label": name.label if name else None,
        "magnification": name.magnification if name else None,
        "seq": name.seq if name else None,
    }
