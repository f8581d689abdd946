//! How much a worker has in flight. A pair of devices that answers at memory speed is served best by little: what is
//! read, sent and received is in the cache yet when it is touched next. A slow device is served by nothing less than the
//! full depth. So a worker begins with a few MiB, and opens the window for good as soon as something takes so long that
//! waiting, not moving bytes, must be what it is spent on.

use std::time::{Duration, Instant};

/// Bytes in flight, over all workers, as long as all is quick: what a third-level cache holds beside the servers' copies.
pub(super) const QUICK_BYTES: u64 = 4 << 20;
/// A piece that takes longer than this is not quick. At the speed of memory, [`QUICK_BYTES`] take some 2 ms.
pub(super) const QUICK: Duration = Duration::from_millis(8);

#[derive(Debug)]
pub(super) struct Window {
    depth: usize,
    quick_bytes: u64,
    pieces: usize,
    bytes: u64,
    open: bool,
    /// Something ended since [`Window::tick`].
    moved: bool,
}

impl Window {
    /// For at most `depth` pieces, and `quick_bytes` until the window opens.
    pub(super) fn new(depth: usize, quick_bytes: u64) -> Self {
        Window { depth, quick_bytes, pieces: 0, bytes: 0, open: false, moved: false }
    }

    pub(super) fn has_room(&self) -> bool {
        self.pieces < self.depth && (self.open || self.bytes < self.quick_bytes)
    }

    /// A piece of `bytes` is on its way.
    pub(super) fn begin(&mut self, bytes: u64) {
        self.pieces += 1;
        self.bytes += bytes;
    }

    /// It is done, since `began`.
    pub(super) fn end(&mut self, bytes: u64, began: Instant) {
        self.pieces -= 1;
        self.bytes -= bytes;
        self.moved = true;
        self.open |= began.elapsed() > QUICK;
    }

    /// To be called every [`QUICK`]: opens the window if nothing ended since the last time.
    pub(super) fn tick(&mut self) {
        self.open |= !std::mem::replace(&mut self.moved, false) && self.pieces > 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn fill(window: &mut Window) -> usize {
        let mut begun = 0;
        while window.has_room() {
            window.begin(MIB);
            begun += 1;
        }
        begun
    }

    #[test]
    fn a_slow_piece_opens_the_window_and_a_quick_one_does_not() {
        let mut window = Window::new(16, 4 * MIB);
        assert_eq!(fill(&mut window), 4);
        window.end(MIB, Instant::now());
        assert_eq!(fill(&mut window), 1);
        window.end(MIB, Instant::now().checked_sub(2 * QUICK).expect("a clock that runs"));
        assert_eq!(fill(&mut window), 13);
    }

    #[test]
    fn a_window_in_which_nothing_ends_opens() {
        let mut window = Window::new(16, 4 * MIB);
        window.tick();
        assert_eq!(fill(&mut window), 4, "nothing was in flight");
        window.end(MIB, Instant::now());
        window.tick();
        assert_eq!(fill(&mut window), 1);
        window.tick();
        assert_eq!(fill(&mut window), 12);
    }

    #[test]
    fn small_pieces_are_bound_by_the_depth_alone() {
        let mut window = Window::new(64, 4 * MIB);
        (0..63).for_each(|_| window.begin(4096));
        assert!(window.has_room());
        window.begin(4096);
        assert!(!window.has_room());
    }
}
