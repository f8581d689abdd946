//! Names of subvolumes and of the files in them.

use std::collections::HashMap;
use std::ops::ControlFlow;

use zerocopy::FromBytes;

use crate::disk::{InodeExtref, InodeRef, Key, RootRef, item, object};
use crate::reader::{Filesystem, TreeRoot};

/// Directories within directories that a path is followed through.
const DEPTH_MAX: usize = 256;

/// Looks names up, and remembers those of subvolumes.
pub(super) struct Paths<'f, 'a> {
    filesystem: &'f Filesystem<'a>,
    roots: HashMap<u64, TreeRoot>,
    subvolumes: HashMap<u64, Option<String>>,
}

impl<'f, 'a> Paths<'f, 'a> {
    pub(super) fn new(filesystem: &'f Filesystem<'a>, roots: impl IntoIterator<Item = TreeRoot>) -> Self {
        let roots = roots.into_iter().map(|root| (root.id, root)).collect();
        Paths { filesystem, roots, subvolumes: HashMap::from([(object::FS_TREE, Some(String::new()))]) }
    }

    /// The path of a subvolume from the top level on, without a leading slash; none when it is deleted or damaged.
    pub(super) fn of_subvolume(&mut self, id: u64) -> Option<String> {
        let mut chain = Vec::new();
        let mut current = id;
        while !self.subvolumes.contains_key(&current) && chain.len() < DEPTH_MAX {
            let Some((parent, directory, name)) = self.place(current) else {
                self.subvolumes.insert(current, None);
                break;
            };
            chain.push((current, parent, directory, name));
            current = parent;
        }
        for (id, parent, directory, name) in chain.into_iter().rev() {
            let within = self.of_inode(parent, directory);
            let path = match (self.subvolumes.get(&parent).cloned().flatten(), within) {
                (Some(outer), Some(within)) => Some(join(&join(&outer, &within), &name)),
                _ => None,
            };
            self.subvolumes.insert(id, path);
        }
        self.subvolumes.get(&id).cloned().flatten()
    }

    /// In which subvolume another lies, in which of its directories, and its name there.
    fn place(&self, id: u64) -> Option<(u64, u64, String)> {
        let root = self.filesystem.root_tree();
        let from = Key::new(id, item::ROOT_BACKREF, 0);
        let mut found = None;
        let look = &mut |key: Key, body: &[u8]| {
            if (key.objectid, key.kind) == (id, item::ROOT_BACKREF)
                && let Ok((head, name)) = RootRef::read_from_prefix(body)
            {
                found = Some((key.offset, head.directory.get(), text(name)));
            }
            ControlFlow::Break(())
        };
        self.filesystem.for_each_item(root, from, look).ok()?;
        found
    }

    /// The path of an inode within its subvolume: by one of its names, if it has several.
    pub(super) fn of_inode(&self, subvolume: u64, inode: u64) -> Option<String> {
        let root = *self.roots.get(&subvolume)?;
        let mut path = String::new();
        let mut current = inode;
        for _ in 0..DEPTH_MAX {
            if current == object::FIRST_FREE {
                return Some(path);
            }
            let (directory, name) = self.name(root, current)?;
            path = join(&name, &path);
            current = directory;
        }
        None
    }

    /// The directory that an inode is in, and its name there.
    fn name(&self, root: TreeRoot, inode: u64) -> Option<(u64, String)> {
        let mut found = None;
        let look = &mut |key: Key, body: &[u8]| {
            if key.objectid != inode || key.kind > item::INODE_EXTREF {
                return ControlFlow::Break(());
            }
            found = match key.kind {
                item::INODE_REF => InodeRef::read_from_prefix(body).ok().and_then(|(head, rest)| {
                    Some((key.offset, text(rest.get(..head.name_length.get().into())?)))
                }),
                item::INODE_EXTREF => InodeExtref::read_from_prefix(body).ok().and_then(|(head, rest)| {
                    Some((head.parent.get(), text(rest.get(..head.name_length.get().into())?)))
                }),
                _ => None,
            };
            if found.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let from = Key::new(inode, item::INODE_REF, 0);
        self.filesystem.for_each_item(root, from, look).ok()?;
        found
    }
}

fn text(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}

fn join(directory: &str, name: &str) -> String {
    match (directory.is_empty(), name.is_empty()) {
        (true, _) => name.to_owned(),
        (_, true) => directory.to_owned(),
        _ => format!("{directory}/{name}"),
    }
}
