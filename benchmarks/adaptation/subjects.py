"""The models of the study by name."""

from benchmarks.adaptation.encoder import Encoder
from benchmarks.adaptation.language import Language
from benchmarks.adaptation.subject import Subject
from benchmarks.adaptation.vision import Vision

SUBJECTS: dict[str, Subject] = {"encoder": Encoder(), "vision": Vision(), "language": Language()}
