//! Goes through the blocks of one tree, parents first, in key order.

use crate::disk::{Key, LEVEL_MAX, RootItem, object};

use super::{Block, Expected, Fault, Filesystem};

/// Where a tree begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TreeRoot {
    /// The tree.
    pub id: u64,
    /// Logical address of the root block.
    pub bytenr: u64,
    /// Its level.
    pub level: u8,
    /// The transaction that wrote it.
    pub generation: u64,
}

impl TreeRoot {
    /// As the root tree says.
    pub fn of(id: u64, item: &RootItem) -> Self {
        TreeRoot { id, bytenr: item.bytenr.get(), level: item.level, generation: item.generation.get() }
    }

    /// Whether it is a subvolume, whose blocks may be shared with others.
    pub fn is_subvolume(&self) -> bool {
        self.id == object::FS_TREE || (object::FIRST_FREE..=object::LAST_FREE).contains(&self.id)
    }
}

/// A block that a walk has come to.
pub struct Visited<'w> {
    /// Its logical address.
    pub bytenr: u64,
    /// The node that points to it; none for the root.
    pub parent: Option<u64>,
    /// The block, if it can be read.
    pub block: Option<&'w Block>,
    /// What is wrong with it; not descended into unless it can be trusted to lie in this place.
    pub faults: &'w [Fault],
}

struct Frame {
    block: Block,
    next: usize,
    above: Option<Key>,
}

/// A walk through a tree. Not an iterator, since each visit borrows the walk.
///
/// It ends for any input: levels fall on the way down and keys ascend, and a child whose first key is not the one that
/// its parent states is not descended into; so no block is visited twice.
pub struct Walk<'f, 'a> {
    filesystem: &'f Filesystem<'a>,
    root: TreeRoot,
    from: Key,
    started: bool,
    stack: Vec<Frame>,
    faults: Vec<Fault>,
}

impl<'f, 'a> Walk<'f, 'a> {
    /// A walk through a whole tree.
    pub fn new(filesystem: &'f Filesystem<'a>, root: TreeRoot) -> Self {
        Walk::starting_at(filesystem, root, Key::default())
    }

    /// A walk that leaves out blocks whose keys are all below `from`.
    pub fn starting_at(filesystem: &'f Filesystem<'a>, root: TreeRoot, from: Key) -> Self {
        Walk { filesystem, root, from, started: false, stack: Vec::new(), faults: Vec::new() }
    }

    /// Leaves out what lies below the block that was visited last.
    pub fn skip_children(&mut self) {
        if let Some(frame) = self.stack.last_mut() {
            frame.next = usize::MAX;
        }
    }

    /// The next block.
    #[expect(clippy::should_implement_trait, reason = "an Iterator cannot lend its items")]
    pub fn next(&mut self) -> Option<Visited<'_>> {
        self.faults.clear();
        let owner = (!self.root.is_subvolume()).then_some(self.root.id);
        if !self.started {
            self.started = true;
            let expected = Expected {
                owner,
                level: Some(self.root.level.min(LEVEL_MAX - 1)),
                generation: Some(self.root.generation),
                ..Expected::default()
            };
            return Some(self.enter(self.root.bytenr, None, expected, false));
        }
        loop {
            let frame = self.stack.last_mut()?;
            let slot = frame.next;
            let Some(pointer) = frame.block.pointer(slot) else {
                self.stack.pop();
                continue;
            };
            frame.next += 1;
            let following = frame.block.pointer(slot + 1).map(|next| Key::from(next.key));
            let above = following.or(frame.above);
            if following.is_some_and(|following| following <= self.from) {
                continue;
            }
            let first = Key::from(pointer.key);
            // Where keys do not ascend the parent has had its fault, and what lies below might be visited twice.
            let ascends = above.is_none_or(|above| first < above)
                && (slot == 0 || frame.block.key(slot - 1).is_some_and(|before| before < first));
            let expected = Expected {
                owner,
                level: Some(frame.block.level() - 1),
                generation: Some(pointer.generation.get()),
                first: Some(first),
                above,
            };
            let parent = frame.block.bytenr();
            return Some(self.enter(pointer.bytenr.get(), Some(parent), expected, !ascends));
        }
    }

    fn enter(
        &mut self,
        bytenr: u64,
        parent: Option<u64>,
        expected: Expected,
        only_look: bool,
    ) -> Visited<'_> {
        let block = self.filesystem.read_block(bytenr, &expected, &mut self.faults);
        let visited = |block, faults| Visited { bytenr, parent, block, faults };
        let Some(block) = block else { return visited(None, &self.faults) };
        let in_place = Some(block.level()) == expected.level
            && (expected.first.is_none() || block.key(0) == expected.first)
            && block.header().bytenr.get() == bytenr;
        let next = if only_look || !in_place { usize::MAX } else { 0 };
        self.stack.push(Frame { block, next, above: expected.above });
        visited(self.stack.last().map(|frame| &frame.block), &self.faults)
    }
}
