//! Buffers that begin on a page: devices below may read into them with O_DIRECT.

/// Bytes of a page.
const PAGE: usize = 4096;

/// A run of bytes that begins on a page boundary.
pub(crate) struct PageBuffer {
    bytes: Vec<u8>,
    start: usize,
    length: usize,
}

impl PageBuffer {
    pub(crate) fn new(length: usize) -> PageBuffer {
        let bytes = vec![0_u8; length + PAGE - 1];
        let address = bytes.as_ptr().addr();
        PageBuffer { start: address.next_multiple_of(PAGE) - address, bytes, length }
    }

    /// The first `length` bytes, or all where there are fewer.
    pub(crate) fn first(&self, length: usize) -> &[u8] {
        self.bytes.get(self.start..self.start + length.min(self.length)).unwrap_or_default()
    }

    /// The first `length` bytes, or all where there are fewer.
    pub(crate) fn first_mut(&mut self, length: usize) -> &mut [u8] {
        self.bytes.get_mut(self.start..self.start + length.min(self.length)).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn begins_on_a_page_and_never_reaches_beyond_its_length() {
        for length in [1, 4095, 4096, 8192, 1 << 20] {
            let mut buffer = PageBuffer::new(length);
            assert_eq!(buffer.first(length).as_ptr().addr() % PAGE, 0);
            assert_eq!(buffer.first_mut(usize::MAX / 2).len(), length);
        }
    }
}
