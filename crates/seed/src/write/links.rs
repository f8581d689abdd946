//! Who is in which directory, and which names an inode has: found in one pass over a file tree, which is checked
//! on the way.

use crate::disk::NAME_MAX;
use crate::{FileTree, NodeKind};

/// Children of directories and names of inodes: 12 bytes for each node.
pub(super) struct Links {
    /// Where each node's children begin in `children`; one more at the end.
    starts: Vec<u32>,
    children: Vec<u32>,
    /// Each node's position among the children of its parent.
    positions: Vec<u32>,
    /// (target, hard link), sorted.
    links: Vec<(u32, u32)>,
}

impl Links {
    /// # Errors
    /// The first node that breaks a rule of [`FileTree`], and the rule.
    pub(super) fn new(tree: &dyn FileTree) -> Result<Self, (usize, String)> {
        let count = tree.len();
        if count == 0 || !matches!(tree.node(0).kind, NodeKind::Directory) {
            return Err((0, "the tree has no root directory".to_owned()));
        }
        if count > u32::MAX as usize - 1 {
            return Err((0, format!("{count} nodes; at most 2^32 - 2 can be written")));
        }
        let mut starts = vec![0; count + 1];
        let mut positions = vec![0; count];
        let mut links = Vec::new();
        for (index, position) in positions.iter_mut().enumerate().skip(1) {
            let node = tree.node(index);
            let parent = node.parent as usize;
            if parent >= index || !matches!(tree.node(parent).kind, NodeKind::Directory) {
                return Err((index, format!("its parent, node {parent}, is no directory before it")));
            }
            check_name(node.name).map_err(|reason| (index, reason))?;
            if let NodeKind::HardLink(target) = node.kind {
                let kind = ((target as usize) < count).then(|| tree.node(target as usize).kind);
                if matches!(kind, None | Some(NodeKind::Directory | NodeKind::HardLink(_))) {
                    return Err((index, format!("a hard link to node {target}, which is no file")));
                }
                links.push((target, index as u32));
            } else {
                let attributes = &node.attributes;
                for time in [attributes.atime, attributes.mtime, attributes.ctime] {
                    if time.nanoseconds >= 1_000_000_000 {
                        return Err((index, format!("a time has {} nanoseconds", time.nanoseconds)));
                    }
                }
            }
            *position = starts[parent];
            starts[parent] += 1;
        }
        let mut total = 0;
        for start in &mut starts {
            (*start, total) = (total, total + *start);
        }
        let mut children = vec![0; count - 1];
        for index in 1..count {
            let parent = tree.node(index).parent as usize;
            children[(starts[parent] + positions[index]) as usize] = index as u32;
        }
        links.sort_unstable();
        Ok(Links { starts, children, positions, links })
    }

    /// The nodes in a directory, in the order of their indices.
    pub(super) fn children(&self, directory: usize) -> &[u32] {
        &self.children[self.starts[directory] as usize..self.starts[directory + 1] as usize]
    }

    /// Where a node stands among the children of its parent.
    pub(super) fn position(&self, node: usize) -> u64 {
        self.positions[node].into()
    }

    /// The hard links to a node, as (node, link).
    pub(super) fn other_names(&self, node: usize) -> &[(u32, u32)] {
        let node = node as u32;
        let start = self.links.partition_point(|link| link.0 < node);
        let length = self.links[start..].partition_point(|link| link.0 == node);
        &self.links[start..start + length]
    }
}

/// Whether a name can stand in a directory.
pub(super) fn check_name(name: &[u8]) -> Result<(), String> {
    if name.is_empty() || name.len() > NAME_MAX {
        return Err(format!("names have 1 to {NAME_MAX} bytes, this has {}", name.len()));
    }
    if name == b"." || name == b".." || name.iter().any(|&byte| byte == b'/' || byte == 0) {
        return Err("a name may not be \".\" or \"..\" nor hold a slash or a zero byte".to_owned());
    }
    Ok(())
}
