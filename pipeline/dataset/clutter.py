"""Files and folders that systems, file servers and editors leave in a dataset: they are counted, and never searched."""

from __future__ import annotations

#: What leaves them, and their names, in any letter case; an asterisk stands for any end of a name.
CLUTTER: dict[str, tuple[str, ...]] = {
    "macOS": (".DS_Store", "._*", ".AppleDouble", ".AppleDB", ".AppleDesktop", ".localized", "Icon\r"),
    "macOS, on a whole disk": (".Spotlight-V100", ".fseventsd", ".DocumentRevisions-V100", ".apdisk"),
    "macOS, temporary files": (".TemporaryItems", "Temporary Items", ".VolumeIcon.icns"),
    "archives made by macOS": ("__MACOSX",),
    "Windows": ("Thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "System Volume Information"),
    "recycle bins": ("$RECYCLE.BIN", "RECYCLER", "RECYCLED", "Recycle Bin", "Network Recycle Bin*", ".recycle"),
    "trash": ("Trash", "Trash Bin", ".Trash", ".Trashes", ".Trash-*", "Network Trash Folder", "trashbox", "Корзина"),
    "snapshots and versions": (".snapshot", ".snapshots", "~snapshot", ".zfs", ".stversions"),
    "Synology": ("#recycle", "@eaDir", "#snapshot", "@tmp"),
    "QNAP": ("@Recycle", ".@__thumb", "@Recently-Snapshot"),
    "Linux": ("lost+found", ".directory", ".nfs*", ".fuse_hidden*"),
    "office suites": ("~$*", ".~lock.*"),
}

_ALL = [name.lower() for names in CLUTTER.values() for name in names]
_NAMES = frozenset(_ALL)
_BEGINNINGS = tuple(name.removesuffix("*") for name in _ALL if name.endswith("*"))


def is_clutter(name: str) -> bool:
    """Return whether a file or a folder of this name is clutter."""
    name = name.lower()
    return name in _NAMES or name.startswith(_BEGINNINGS)
