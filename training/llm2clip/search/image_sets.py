"""The images and captions that an index can be made of."""

from __future__ import annotations

from typing import TypeAlias

from llm2clip.search.folder_images import FolderImages
from llm2clip.search.table_captions import TableCaptions
from llm2clip.search.table_images import TableImages

IndexedImages: TypeAlias = FolderImages | TableImages
IndexedItems: TypeAlias = IndexedImages | TableCaptions
