//! Goes through the trees of subvolumes forwards, each shared block at most once where nothing in it was of interest.
//!
//! Who references an extent could be asked of its back references, but those name only one of the subvolumes that share a
//! leaf; going forwards finds them all. Snapshots share almost all of their blocks, so what matters is not to read them
//! again for each.

use std::collections::HashSet;

use crate::disk::Key;
use crate::reader::{Block, Expected, Filesystem, TreeRoot};

/// Blocks that are remembered as holding nothing; beyond them blocks are read again.
const REMEMBERED_MAX: usize = 1 << 22;

/// What to do with a block that was visited before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Again {
    /// Never visit a block twice.
    Never,
    /// Visit it again for another tree, unless it was seen to hold nothing of interest.
    Interesting,
}

/// Walks over several trees.
pub(super) struct Forward<'f, 'a> {
    filesystem: &'f Filesystem<'a>,
    again: Again,
    skip: HashSet<u64>,
    visits_left: u64,
    damaged: u64,
}

struct Frame {
    block: Block,
    next: usize,
    above: Option<Key>,
    interesting: bool,
}

impl<'f, 'a> Forward<'f, 'a> {
    /// `visits` blocks are read at most.
    pub(super) fn new(filesystem: &'f Filesystem<'a>, again: Again, visits: u64) -> Self {
        Forward { filesystem, again, skip: HashSet::new(), visits_left: visits, damaged: 0 }
    }

    /// Whether not everything was visited.
    pub(super) fn is_cut_short(&self) -> bool {
        self.visits_left == 0
    }

    /// Blocks that could not be read or trusted.
    pub(super) fn damaged(&self) -> u64 {
        self.damaged
    }

    /// Shows the blocks of a tree that do not lie wholly below `from`; `visit` says of a leaf whether it was of interest.
    ///
    /// Ends for any input: levels fall on the way down, keys must ascend, and visits are bounded.
    pub(super) fn walk(&mut self, root: TreeRoot, from: Key, visit: &mut dyn FnMut(&Block) -> bool) {
        let expected =
            Expected { level: Some(root.level), generation: Some(root.generation), ..Expected::default() };
        let mut stack = Vec::new();
        self.enter(root.bytenr, &expected, &mut stack, visit);
        while let Some(frame) = stack.last_mut() {
            let slot = frame.next;
            frame.next += 1;
            let Some(pointer) = frame.block.pointer(slot) else {
                self.leave(&mut stack);
                continue;
            };
            let following = frame.block.pointer(slot + 1).map(|next| Key::from(next.key));
            let (first, above) = (Key::from(pointer.key), following.or(frame.above));
            let ascends = above.is_none_or(|above| first < above);
            let is_gone = following.is_some_and(|following| following <= from);
            if !ascends || is_gone || self.skip.contains(&pointer.bytenr.get()) {
                continue;
            }
            let expected = Expected {
                owner: None,
                level: Some(frame.block.header().level - 1),
                generation: Some(pointer.generation.get()),
                first: Some(first),
                above,
            };
            self.enter(pointer.bytenr.get(), &expected, &mut stack, visit);
        }
    }

    fn enter(
        &mut self,
        bytenr: u64,
        expected: &Expected,
        stack: &mut Vec<Frame>,
        visit: &mut dyn FnMut(&Block) -> bool,
    ) {
        if self.visits_left == 0 || self.skip.contains(&bytenr) {
            return;
        }
        self.visits_left -= 1;
        let mut faults = Vec::new();
        let block = self.filesystem.read_block(bytenr, expected, &mut faults);
        self.damaged += u64::from(!faults.is_empty());
        let Some(block) = block else { return };
        let in_place = Some(block.header().level) == expected.level
            && (expected.first.is_none() || block.key(0) == expected.first)
            && block.header().bytenr.get() == bytenr;
        if !in_place {
            return;
        }
        let interesting = visit(&block);
        stack.push(Frame { block, next: 0, above: expected.above, interesting });
    }

    /// A block and all below it have been visited.
    fn leave(&mut self, stack: &mut Vec<Frame>) {
        let Some(frame) = stack.pop() else { return };
        let skip = self.again == Again::Never || !frame.interesting;
        if skip && self.skip.len() < REMEMBERED_MAX && self.visits_left > 0 {
            self.skip.insert(frame.block.bytenr());
        }
        if let Some(parent) = stack.last_mut() {
            parent.interesting |= frame.interesting;
        }
    }
}
