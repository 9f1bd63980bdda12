"""Text in, batches out: sources, tokenizers, packing, mixtures, and procedural generators. See docs/data.md."""

from data.corpus import Corpus, Document
from data.errors import DataError
from data.packing import Batch
from data.pipeline import Pipeline, build
from data.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "Batch",
    "ByteTokenizer",
    "Corpus",
    "DataError",
    "Document",
    "Pipeline",
    "Tokenizer",
    "build",
    "load_tokenizer",
]
