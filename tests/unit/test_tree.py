from __future__ import annotations

import pytest

from weightfs.errors import StaleError
from weightfs.index.schema import ROOT_INODE, EntryRecord, Kind, inode_number
from weightfs.index.store import IndexStore
from weightfs.tree import Node, Tree

ROOT_KEY = b"root" * 4


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


@pytest.fixture
def tree(index: IndexStore) -> Tree:
    return Tree(index, ROOT_KEY)


@pytest.fixture
def folder(tree: Tree) -> Node:
    return tree.see(Kind.SOURCE, ROOT_INODE, b"folder", key(1))


def test_the_root_is_there_from_the_start(tree: Tree) -> None:
    root = tree.node(ROOT_INODE)
    assert tree.path(root) == b""
    assert root.kind is Kind.SOURCE
    tree.forget(ROOT_INODE, 1000)
    assert tree.node(ROOT_INODE) is root


def test_what_is_seen_twice_is_one_node(tree: Tree, folder: Node) -> None:
    assert tree.see(Kind.SOURCE, ROOT_INODE, b"folder", key(1)) is folder
    file = tree.see(Kind.SOURCE, folder.inode, b"a", key(2))
    assert file.inode not in (folder.inode, ROOT_INODE)
    assert tree.path(file) == b"folder/a"
    assert tree.node(file.inode) is file
    assert len(tree) == 3


def test_see_all_is_see_for_each(tree: Tree, index: IndexStore, folder: Node) -> None:
    remembered = tree.see(Kind.SOURCE, folder.inode, b"b", key(12))
    tree.forget(remembered.inode, 1)
    known = tree.see(Kind.SOURCE, folder.inode, b"c", key(13))
    entries = [(b"a", key(11)), (b"b", key(12)), (b"c", key(13)), (b"link-to-a", key(11))]
    nodes = tree.see_all(folder.inode, entries)
    assert [node.inode for node in nodes[1:3]] == [remembered.inode, known.inode]
    assert nodes[0] is nodes[3]
    assert tree.path(nodes[0]) == b"folder/link-to-a", "where it was last seen"
    assert len({node.inode for node in nodes}) == 3
    assert [index.number_of(entry_key) for _, entry_key in entries] == [node.inode for node in nodes]
    assert tree.see_all(folder.inode, []) == []


def test_a_rename_keeps_the_number(tree: Tree, index: IndexStore, folder: Node) -> None:
    file = tree.see(Kind.SOURCE, ROOT_INODE, b"a", key(2))
    moved = tree.see(Kind.SOURCE, folder.inode, b"b", key(2))
    assert moved is file
    assert tree.path(file) == b"folder/b"
    assert index.entry(file.inode) == EntryRecord(Kind.SOURCE, folder.inode, b"b", key(2))
    again = tree.see(Kind.SOURCE, ROOT_INODE, b"renamed", key(1))
    assert again is folder
    assert tree.path(file) == b"renamed/b"


def test_a_hard_link_is_one_inode_wherever_it_was_last_seen(tree: Tree, folder: Node) -> None:
    one = tree.see(Kind.SOURCE, ROOT_INODE, b"one", key(2))
    assert tree.see(Kind.SOURCE, folder.inode, b"two", key(2)) is one
    assert tree.path(one) == b"folder/two"
    assert tree.see(Kind.SOURCE, ROOT_INODE, b"one", key(2)) is one
    assert tree.path(one) == b"one"


def test_a_name_that_means_another_file_is_another_inode(tree: Tree) -> None:
    old = tree.see(Kind.SOURCE, ROOT_INODE, b"a", key(2))
    new = tree.see(Kind.SOURCE, ROOT_INODE, b"a", key(3))
    assert new.inode != old.inode
    assert tree.path(old) == tree.path(new) == b"a"


def test_the_source_mounted_on_itself_is_the_root(tree: Tree) -> None:
    node = tree.see(Kind.SOURCE, ROOT_INODE, b"loop", ROOT_KEY)
    assert node.inode == ROOT_INODE
    assert tree.path(node) == b""


def test_virtual_entries_are_told_apart_by_place_and_name(tree: Tree, folder: Node) -> None:
    tensors = tree.see_virtual(Kind.VIEW_ROOT, ROOT_INODE, b".tensors")
    others = [
        tree.see_virtual(Kind.VIEW_ROOT, ROOT_INODE, b".npy"),
        tree.see_virtual(Kind.VIEW_ROOT, folder.inode, b".tensors"),
        tree.see(Kind.SOURCE, ROOT_INODE, b".tensors", key(9)),
    ]
    assert tree.see_virtual(Kind.VIEW_ROOT, ROOT_INODE, b".tensors") is tensors
    assert tensors.inode not in {node.inode for node in others}
    model = tree.see_virtual(Kind.VIEW_SET, tensors.inode, b"model")
    assert tree.path(model) == b".tensors/model"


# What is dropped from memory is found again


def test_forget_drops_a_node_when_the_last_look_up_is_taken_back(tree: Tree, folder: Node) -> None:
    for _ in range(3):
        tree.count_lookup(folder)
    tree.forget(folder.inode, 2)
    assert tree.node(folder.inode) is folder
    tree.forget(folder.inode, 1)
    assert len(tree) == 1
    found = tree.node(folder.inode)
    assert found is not folder
    assert (found.inode, found.name, found.key, found.lookups) == (folder.inode, b"folder", key(1), 0)
    assert tree.see(Kind.SOURCE, ROOT_INODE, b"folder", key(1)) is found


def test_forgetting_too_much_or_what_is_not_known_changes_nothing(tree: Tree, folder: Node) -> None:
    tree.forget(12345, 1)
    tree.forget(folder.inode, 1 << 60)
    assert tree.node(folder.inode).name == b"folder"


def test_a_node_is_found_below_forgotten_folders(tree: Tree, folder: Node) -> None:
    file = tree.see(Kind.SOURCE, folder.inode, b"a", key(2))
    tree.forget(folder.inode, 1)
    assert tree.path(file) == b"folder/a"


def test_a_new_name_after_forgetting_is_recorded(tree: Tree, index: IndexStore) -> None:
    file = tree.see(Kind.SOURCE, ROOT_INODE, b"a", key(2))
    tree.forget(file.inode, 1)
    again = tree.see(Kind.SOURCE, ROOT_INODE, b"b", key(2))
    assert again.inode == file.inode
    assert index.entry(file.inode) == EntryRecord(Kind.SOURCE, ROOT_INODE, b"b", key(2))


def test_a_restart_finds_numbers_and_paths(state: str) -> None:
    index = IndexStore(state, "source")
    tree = Tree(index, ROOT_KEY)
    folder = tree.see(Kind.SOURCE, ROOT_INODE, b"folder", key(1))
    file = tree.see(Kind.SOURCE, folder.inode, b"a\xff", key(2))
    virtual = tree.see_virtual(Kind.VIEW_ROOT, folder.inode, b".npy")
    index.close()
    index = IndexStore(state, "source")
    again = Tree(index, ROOT_KEY)
    assert again.path(again.node(file.inode)) == b"folder/a\xff"
    assert again.path(again.node(virtual.inode)) == b"folder/.npy"
    assert again.node(virtual.inode).kind is Kind.VIEW_ROOT
    assert again.see(Kind.SOURCE, ROOT_INODE, b"folder", key(1)).inode == folder.inode
    assert again.see_all(folder.inode, [(b"a\xff", key(2))])[0].inode == file.inode
    assert again.see_virtual(Kind.VIEW_ROOT, folder.inode, b".npy").inode == virtual.inode
    index.close()


# What is not known


def test_a_number_of_no_epoch_or_another_is_stale(tree: Tree, index: IndexStore) -> None:
    for inode in (0, 2, inode_number(index.epoch, 5_000_000), inode_number(index.epoch + 1, 2), (1 << 63) - 1):
        with pytest.raises(StaleError):
            tree.node(inode)


def test_a_folder_above_that_is_not_known_is_stale(tree: Tree, index: IndexStore) -> None:
    index.put_entry(100, EntryRecord(Kind.SOURCE, 4711, b"orphan", key(7)))
    with pytest.raises(StaleError):
        tree.path(tree.node(100))


def test_folders_in_a_circle_are_stale(tree: Tree, index: IndexStore) -> None:
    index.put_entry(100, EntryRecord(Kind.SOURCE, 101, b"a", key(7)))
    index.put_entry(101, EntryRecord(Kind.SOURCE, 100, b"b", key(8)))
    index.put_entry(102, EntryRecord(Kind.SOURCE, 102, b"c", key(9)))
    for inode in (100, 101, 102):
        with pytest.raises(StaleError):
            tree.path(tree.node(inode))


def test_a_path_as_deep_as_paths_get(tree: Tree) -> None:
    node = tree.node(ROOT_INODE)
    for depth in range(2047):
        node = tree.see(Kind.SOURCE, node.inode, b"d", key(depth + 100))
    assert tree.path(node) == b"/".join([b"d"] * 2047)


def test_what_the_index_dropped_is_forgotten_held_or_not(tree: Tree, index: IndexStore, folder: Node) -> None:
    held = tree.see(Kind.SOURCE, folder.inode, b"held", key(2))
    tree.count_lookup(held)
    tree.drop([held.inode, inode_number(index.epoch, 5_000_000)])
    again = tree.see(Kind.SOURCE, folder.inode, b"held", key(2))
    assert again is not held


def test_shedding_keeps_what_the_kernel_holds(tree: Tree, folder: Node) -> None:
    held, idle = (tree.see(Kind.SOURCE, folder.inode, name, key(2 + at)) for at, name in enumerate((b"held", b"idle")))
    tree.count_lookup(held)
    tree.shed()
    assert len(tree) == 2, "the root and what is held"
    assert tree.node(held.inode) is held
    assert tree.path(tree.node(held.inode)) == b"folder/held", "the index knows the folder"
    assert tree.node(idle.inode).name == b"idle"
    assert tree.see(Kind.SOURCE, folder.inode, b"idle", key(3)).inode == idle.inode
