"""Records what SQLite does to its files, through a VFS over the one of the operating system.

See https://www.sqlite.org/c3ref/vfs.html and https://www.sqlite.org/c3ref/io_methods.html. The file `-shm` is not
recorded: it is memory shared by the connections, and the first one rebuilds it.
"""

from __future__ import annotations

import _sqlite3
import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import CFUNCTYPE, POINTER, Structure, c_char_p, c_int, c_int64, c_void_p
from typing import Any

from tests.power.log import Recorder

# Paths are passed on as pointers: SQLite keeps them while a file is open.
_Open = CFUNCTYPE(c_int, c_void_p, c_void_p, c_void_p, c_int, c_void_p)
_Delete = CFUNCTYPE(c_int, c_void_p, c_void_p, c_int)
_Write = CFUNCTYPE(c_int, c_void_p, c_void_p, c_int, c_int64)
_Truncate = CFUNCTYPE(c_int, c_void_p, c_int64)
_Sync = CFUNCTYPE(c_int, c_void_p, c_int)
_OpenFolder = CFUNCTYPE(c_int, c_void_p, c_void_p)
_SetCall = CFUNCTYPE(c_int, c_void_p, c_char_p, c_void_p)
_GetCall = CFUNCTYPE(c_void_p, c_void_p, c_char_p)


class _Vfs(Structure):
    _fields_ = [
        ("iVersion", c_int),
        ("szOsFile", c_int),
        ("mxPathname", c_int),
        ("pNext", c_void_p),
        ("zName", c_char_p),
        ("pAppData", c_void_p),
        ("xOpen", _Open),
        ("xDelete", _Delete),
        *((f"x{number}", c_void_p) for number in range(11)),
        ("xSetSystemCall", _SetCall),
        ("xGetSystemCall", _GetCall),
        ("xNextSystemCall", c_void_p),
    ]


class _Methods(Structure):
    _fields_ = [
        ("iVersion", c_int),
        ("xClose", c_void_p),
        ("xRead", c_void_p),
        ("xWrite", _Write),
        ("xTruncate", _Truncate),
        ("xSync", _Sync),
        *((f"x{number}", c_void_p) for number in range(13)),
    ]


def library() -> Any:
    """Return the library that the module sqlite3 uses, None if it is linked into the interpreter without names."""
    try:
        found = ctypes.CDLL(getattr(_sqlite3, "__file__", None))
        found.sqlite3_vfs_find.restype = POINTER(_Vfs)
    except (AttributeError, OSError):
        return None
    return found


@contextmanager
def recorded(recorder: Recorder) -> Iterator[None]:
    """Record what SQLite does to files of a disk in the block; connections have to be opened and closed in it."""
    sqlite = library()
    system = sqlite.sqlite3_vfs_find(None)
    calls = _Calls(recorder, ctypes.cast(system, c_void_p), system.contents)
    vfs = _Vfs.from_buffer_copy(system.contents)
    vfs.zName, vfs.pNext = b"recorded", None
    vfs.xOpen, vfs.xDelete = _Open(calls.open), _Delete(calls.delete)
    hook = _OpenFolder(calls.open_folder)
    system.contents.xSetSystemCall(calls.system, b"openDirectory", ctypes.cast(hook, c_void_p))
    assert sqlite.sqlite3_vfs_register(ctypes.byref(vfs), 1) == 0
    try:
        yield
    finally:
        assert sqlite.sqlite3_vfs_unregister(ctypes.byref(vfs)) == 0
        assert sqlite.sqlite3_vfs_register(system, 1) == 0
        system.contents.xSetSystemCall(calls.system, b"openDirectory", None)


class _Calls:
    """The calls of SQLite that change a disk: each is passed to the original and recorded."""

    def __init__(self, recorder: Recorder, system: c_void_p, original: _Vfs) -> None:
        self.system = system
        self._recorder = recorder
        self._original = original
        self._open_folder = _OpenFolder(original.xGetSystemCall(system, b"openDirectory"))
        #: By the address of the open file: the number of its inode, and its name.
        self._files: dict[int, tuple[int, str]] = {}
        #: By the address of the methods of a kind of file: those that record, and the original ones.
        self._methods: dict[int, tuple[_Methods, _Methods]] = {}

    def open(self, _: int, path: int | None, file: int, flags: int, out: int | None) -> int:
        name, recorder = _text(path), self._recorder
        with recorder.lock:
            code = int(self._original.xOpen(self.system, path, file, flags, out))
            if code == 0 and recorder.contains(name):
                inode = recorder.inode_of(name)
                if inode is None:
                    inode = recorder.made(name, is_folder=False)
                self._files[file] = inode, os.path.basename(name)
                methods = ctypes.cast(file, POINTER(c_void_p))  # the first member of sqlite3_file
                methods[0] = ctypes.addressof(self._recording(int(methods[0] or 0)))
        return code

    def _recording(self, address: int) -> _Methods:
        if address not in self._methods:
            original = ctypes.cast(address, POINTER(_Methods)).contents
            copy = _Methods.from_buffer_copy(original)

            def write(file: int, content: int, size: int, offset: int) -> int:
                with self._recorder.lock:
                    self._recorder.before()
                    code = int(original.xWrite(file, content, size, offset))
                    if code == 0:
                        self._recorder.written(self._files[file][0], offset, ctypes.string_at(content, size))
                return code

            def truncate(file: int, size: int) -> int:
                with self._recorder.lock:
                    self._recorder.before()
                    code = int(original.xTruncate(file, size))
                    if code == 0:
                        self._recorder.truncated(self._files[file][0], size)
                return code

            def sync(file: int, flags: int) -> int:
                inode, name = self._files[file]
                self._recorder.file_synced(inode, f"SQLite: {name}")
                return int(original.xSync(file, flags))

            copy.xWrite, copy.xTruncate, copy.xSync = _Write(write), _Truncate(truncate), _Sync(sync)
            self._methods[address] = copy, original
        return self._methods[address][0]

    def delete(self, _: int, path: int, sync: int) -> int:
        name, recorder = _text(path), self._recorder
        with recorder.lock:
            recorder.before()
            if recorder.contains(name) and os.path.exists(name):
                recorder.unlinked(name)
        return int(self._original.xDelete(self.system, path, sync))

    def open_folder(self, path: int, out: int) -> int:
        """Record a sync: SQLite opens the folder of a file for nothing else."""
        name = _text(path)
        if self._recorder.contains(name):
            self._recorder.folder_synced(os.path.dirname(name), "SQLite: the folder of index.sqlite")
        return int(self._open_folder(path, out))


def _text(path: int | None) -> str:
    return os.fsdecode(ctypes.string_at(path)) if path else ""
