//! The log's format, without I/O: a header and a chain of frames. `docs/formats/map.md` has the byte map.
//!
//! How a torn tail is told from damage: a frame says how many frames before it were not yet synced when it was
//! written. Frames of one batch that was cut off by a power failure may be there in any mixture, but a frame that
//! says "all before me were durable" proves that a bad frame before it was once good. Each successful sync is
//! therefore followed by an (unsynced) mark, so that even the last batch of a map that rests is proven durable.

use std::collections::VecDeque;

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::{Address, ContentId, Range};

/// The first bytes of a log.
pub(crate) const MAGIC: [u8; 8] = *b"loam-map";
/// The newest version that this code reads and the one that it writes, of log and table alike.
pub(crate) const VERSION: u32 = 1;
/// Frames begin at multiples of this.
const ALIGNMENT: usize = 8;
/// Ranges in one frame: 1 MiB.
pub(crate) const FRAME_RANGES_MAX: usize = 32 << 10;
/// Longest description of a content, in bytes.
pub const SPEC_BYTES_MAX: usize = 64 << 10;
/// Longest payload that a frame may have, in bytes.
const PAYLOAD_MAX: usize = FRAME_RANGES_MAX * size_of::<DiskRange>();

/// The start of the log file.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct DiskHeader {
    pub(crate) magic: [u8; 8],
    pub(crate) version: U32,
    pub(crate) reserved: U32,
    /// Bytes of the address space.
    pub(crate) size: U64,
    /// Sequence number of the first frame.
    pub(crate) sequence: U64,
    /// Number of the table that the log goes on from; 0 for none.
    pub(crate) table: U64,
    /// CRC32C of that table's header, so that another table of this number is not taken for it.
    pub(crate) table_crc: U32,
    /// CRC32C of everything before.
    pub(crate) crc: U32,
}
const _: () = assert!(size_of::<DiskHeader>() == 48);
pub(crate) const HEADER_BYTES: usize = size_of::<DiskHeader>();

#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct DiskFrame {
    /// Bytes of the payload, without padding.
    length: U32,
    kind: U32,
    sequence: U64,
    /// How many frames before this one were not known to be durable when it was written.
    unsynced: U32,
    /// The `crc` of the frame before, or of the log's header.
    previous: U32,
    /// CRC32C of the payload.
    payload_crc: U32,
    /// CRC32C of everything before.
    crc: U32,
}
const _: () = assert!(size_of::<DiskFrame>() == 32);
const FRAME_BYTES: usize = size_of::<DiskFrame>();

#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct DiskRange {
    pub(crate) start: U64,
    length: U64,
    content_offset: U64,
    content: U32,
    reserved: U32,
}
const _: () = assert!(size_of::<DiskRange>() == 32);

const KIND_CONTENT: u32 = 1;
const KIND_RANGES: u32 = 2;
const KIND_RESERVE: u32 = 3;
const KIND_MARK: u32 = 4;

impl DiskHeader {
    pub(crate) fn new(size: u64, sequence: u64, table: u64, table_crc: u32) -> Self {
        let mut header = DiskHeader {
            magic: MAGIC,
            version: U32::new(VERSION),
            reserved: U32::ZERO,
            size: U64::new(size),
            sequence: U64::new(sequence),
            table: U64::new(table),
            table_crc: U32::new(table_crc),
            crc: U32::ZERO,
        };
        header.crc = U32::new(crc_before_last(header.as_bytes()));
        header
    }

    pub(crate) fn is_intact(&self) -> bool {
        self.crc.get() == crc_before_last(self.as_bytes())
    }
}

/// CRC32C of all but the last four bytes.
pub(crate) fn crc_before_last(bytes: &[u8]) -> u32 {
    crc32c::crc32c(&bytes[..bytes.len() - 4])
}

/// One thing that a log says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Record<'a> {
    /// A content and what describes it.
    Content { id: ContentId, spec: &'a [u8] },
    /// Ranges, in any order; all of them or none.
    Ranges(Vec<Range>),
    /// Addresses below this were handed out.
    Reserve(Address),
    /// Everything before was durable.
    Mark,
}

impl Record<'_> {
    fn kind(&self) -> u32 {
        match self {
            Record::Content { .. } => KIND_CONTENT,
            Record::Ranges(_) => KIND_RANGES,
            Record::Reserve(_) => KIND_RESERVE,
            Record::Mark => KIND_MARK,
        }
    }

    fn append_payload(&self, bytes: &mut Vec<u8>) {
        match self {
            Record::Content { id, spec } => {
                bytes.extend_from_slice(&id.0.to_le_bytes());
                bytes.extend_from_slice(spec);
            }
            Record::Ranges(ranges) => {
                for range in ranges {
                    bytes.extend_from_slice(DiskRange::from(range).as_bytes());
                }
            }
            Record::Reserve(address) => bytes.extend_from_slice(&address.0.to_le_bytes()),
            Record::Mark => {}
        }
    }
}

fn parse_payload(kind: u32, payload: &[u8]) -> Result<Record<'_>, String> {
    match kind {
        KIND_CONTENT => match payload.split_first_chunk() {
            Some((id, spec)) if spec.len() <= SPEC_BYTES_MAX => {
                Ok(Record::Content { id: ContentId(u32::from_le_bytes(*id)), spec })
            }
            _ => Err(format!("a content record of {} bytes", payload.len())),
        },
        KIND_RANGES => match <[DiskRange]>::ref_from_bytes(payload) {
            Ok(ranges) => Ok(Record::Ranges(ranges.iter().map(Range::from).collect())),
            Err(_) => Err(format!("a range record of {} bytes", payload.len())),
        },
        KIND_RESERVE => match payload.try_into() {
            Ok(address) => Ok(Record::Reserve(Address(u64::from_le_bytes(address)))),
            Err(_) => Err(format!("a reservation record of {} bytes", payload.len())),
        },
        KIND_MARK if payload.is_empty() => Ok(Record::Mark),
        KIND_MARK => Err(format!("a mark of {} bytes", payload.len())),
        _ => Err(format!("a record of the unknown kind {kind}")),
    }
}

impl From<&Range> for DiskRange {
    fn from(range: &Range) -> DiskRange {
        DiskRange {
            start: U64::new(range.start.0),
            length: U64::new(range.length),
            content_offset: U64::new(range.content_offset),
            content: U32::new(range.content.0),
            reserved: U32::ZERO,
        }
    }
}

impl From<&DiskRange> for Range {
    fn from(range: &DiskRange) -> Range {
        Range {
            start: Address(range.start.get()),
            length: range.length.get(),
            content: ContentId(range.content.get()),
            content_offset: range.content_offset.get(),
        }
    }
}

/// Where the chain of frames stands: what the next frame has to say of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Chain {
    /// Sequence number of the next frame.
    pub(crate) sequence: u64,
    /// Frames before this number are durable.
    pub(crate) durable: u64,
    /// CRC of the frame before.
    pub(crate) previous: u32,
}

impl Chain {
    pub(crate) fn after_header(header: &DiskHeader) -> Self {
        let sequence = header.sequence.get();
        Chain { sequence, durable: sequence, previous: header.crc.get() }
    }

    /// Appends `record` as a frame to `bytes`.
    pub(crate) fn append(&mut self, record: &Record<'_>, bytes: &mut Vec<u8>) {
        let start = bytes.len();
        bytes.resize(start + FRAME_BYTES, 0);
        record.append_payload(bytes);
        let payload = &bytes[start + FRAME_BYTES..];
        assert!(payload.len() <= PAYLOAD_MAX, "callers split what is longer");
        let mut frame = DiskFrame {
            length: U32::new(payload.len() as u32),
            kind: U32::new(record.kind()),
            sequence: U64::new(self.sequence),
            unsynced: U32::new(u32::try_from(self.sequence - self.durable).unwrap_or(u32::MAX)),
            previous: U32::new(self.previous),
            payload_crc: U32::new(crc32c::crc32c(payload)),
            crc: U32::ZERO,
        };
        frame.crc = U32::new(crc_before_last(frame.as_bytes()));
        bytes[start..start + FRAME_BYTES].copy_from_slice(frame.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
        self.sequence += 1;
        self.previous = frame.crc.get();
    }
}

/// What reading on in a log comes to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Next<'a> {
    /// A record.
    Record(Record<'a>),
    /// The end of the log, cleanly or at a frame that was being written when the power went.
    End,
    /// Something that was durable is damaged.
    Damaged(String),
}

/// Reads frames from the bytes of a log.
#[derive(Debug)]
pub(crate) struct Reader<'a> {
    bytes: &'a [u8],
    /// Where the next frame begins.
    pub(crate) at: usize,
    /// What the next frame has to say of itself.
    pub(crate) chain: Chain,
    /// Number and place of the frames that no later one has called durable.
    unproven: VecDeque<(u64, usize)>,
}

impl<'a> Reader<'a> {
    /// A reader of the frames behind `header` in `bytes`, which is the whole log.
    pub(crate) fn new(bytes: &'a [u8], header: &DiskHeader) -> Self {
        Reader { bytes, at: HEADER_BYTES, chain: Chain::after_header(header), unproven: VecDeque::new() }
    }

    /// Where the first frame lies that may not be durable, although it was read.
    pub(crate) fn unproven_from(&self) -> usize {
        self.unproven.front().map_or(self.at, |(_, at)| *at)
    }

    /// The next record.
    pub(crate) fn next(&mut self) -> Next<'a> {
        let Some((frame, payload)) = intact_frame(self.bytes, self.at) else {
            return match self.proof_of_damage() {
                Some(proof) => Next::Damaged(format!(
                    "record {} is not what was written, although record {proof} followed it",
                    self.chain.sequence
                )),
                None => Next::End,
            };
        };
        if frame.sequence.get() != self.chain.sequence || frame.previous.get() != self.chain.previous {
            // A frame left over from a write that failed or was torn; it is the end unless a proof says otherwise.
            return match self.proof_of_damage() {
                Some(proof) => {
                    Next::Damaged(format!("record {} is missing before {proof}", self.chain.sequence))
                }
                None => Next::End,
            };
        }
        let Some(sequence) = self.chain.sequence.checked_add(1) else {
            return Next::Damaged("the record numbers have come to their end".to_owned());
        };
        match parse_payload(frame.kind.get(), payload) {
            Err(what) => Next::Damaged(what),
            Ok(record) => {
                let durable = self.chain.sequence.saturating_sub(u64::from(frame.unsynced.get()));
                while self.unproven.pop_front_if(|(number, _)| *number < durable).is_some() {}
                self.unproven.push_back((self.chain.sequence, self.at));
                self.at += (FRAME_BYTES + payload.len()).next_multiple_of(ALIGNMENT);
                self.chain = Chain { sequence, durable: self.chain.durable, previous: frame.crc.get() };
                Next::Record(record)
            }
        }
    }

    /// The number of an intact frame behind the current one that says that the current one was durable.
    fn proof_of_damage(&self) -> Option<u64> {
        // An attacker could have each of many frames claim a long payload; this much is hashed, then a frame's own
        // checksum is proof enough.
        let mut hashed_bytes_left = self.bytes.len() * 2;
        for at in (self.at..self.bytes.len()).step_by(ALIGNMENT) {
            let Some((frame, rest)) = intact_header(self.bytes, at) else { continue };
            let sequence = frame.sequence.get();
            let durable = sequence.saturating_sub(u64::from(frame.unsynced.get()));
            if durable <= self.chain.sequence {
                continue;
            }
            let Some(left) = hashed_bytes_left.checked_sub(frame.length.get() as usize) else {
                return Some(sequence);
            };
            hashed_bytes_left = left;
            if intact_payload(frame, rest).is_some() {
                return Some(sequence);
            }
        }
        None
    }
}

/// The frame at `at`, if its checksums are right.
fn intact_frame(bytes: &[u8], at: usize) -> Option<(&DiskFrame, &[u8])> {
    let (frame, rest) = intact_header(bytes, at)?;
    Some((frame, intact_payload(frame, rest)?))
}

fn intact_header(bytes: &[u8], at: usize) -> Option<(&DiskFrame, &[u8])> {
    let (frame, rest) = DiskFrame::ref_from_prefix(bytes.get(at..)?).ok()?;
    (frame.crc.get() == crc_before_last(frame.as_bytes())).then_some((frame, rest))
}

fn intact_payload<'a>(frame: &DiskFrame, rest: &'a [u8]) -> Option<&'a [u8]> {
    let length = frame.length.get() as usize;
    let payload = rest.get(..length).filter(|_| length <= PAYLOAD_MAX)?;
    (frame.payload_crc.get() == crc32c::crc32c(payload)).then_some(payload)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> DiskHeader {
        DiskHeader::new(1 << 40, 7, 0, 0)
    }

    fn content(id: u32, spec: &[u8]) -> Record<'_> {
        Record::Content { id: ContentId(id), spec }
    }

    /// A log of batches: each is synced before the next is written.
    fn log(batches: &[&[Record<'_>]]) -> Vec<u8> {
        let header = header();
        let mut bytes = header.as_bytes().to_vec();
        let mut chain = Chain::after_header(&header);
        for batch in batches {
            batch.iter().for_each(|record| chain.append(record, &mut bytes));
            chain.durable = chain.sequence;
        }
        bytes
    }

    fn read(bytes: &[u8]) -> (Vec<Record<'_>>, Next<'_>) {
        let mut reader = Reader::new(bytes, &header());
        let mut records = Vec::new();
        loop {
            match reader.next() {
                Next::Record(record) => records.push(record),
                end => return (records, end),
            }
        }
    }

    #[test]
    fn records_are_read_back() {
        let range = |start| Range {
            start: Address(start),
            length: 8192,
            content: ContentId(3),
            content_offset: 1 << 50,
        };
        let written = [
            content(0, b"odd"),
            Record::Ranges(vec![range(4096), range(1 << 39)]),
            Record::Reserve(Address(1 << 33)),
            Record::Mark,
        ];
        assert_eq!(read(&log(&[&written])), (written.to_vec(), Next::End));
    }

    #[test]
    fn the_format_is_the_documented_one() {
        let bytes = log(&[&[Record::Reserve(Address(0x1122_3344_5566_7788))]]);
        assert_eq!(&bytes[..16], b"loam-map\x01\0\0\0\0\0\0\0");
        let frame = &bytes[48..];
        assert_eq!(frame.len(), 40);
        assert_eq!(&frame[..16], [8, 0, 0, 0, 3, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(&frame[16..20], [0; 4], "nothing before it is unsynced");
        assert_eq!(&frame[20..24], &bytes[44..48], "names the header's checksum");
        assert_eq!(&frame[32..], 0x1122_3344_5566_7788u64.to_le_bytes());
    }

    #[test]
    fn a_batch_that_was_being_written_is_the_end_whatever_is_left_of_it() {
        let before = log(&[&[content(0, b"a")]]);
        let batch = [content(1, &[1; 700]), content(2, b"c"), content(3, b"d")];
        let mut bytes = log(&[&[content(0, b"a")], &batch]);
        bytes[before.len() + 40] ^= 1;
        assert_eq!(read(&bytes), (vec![content(0, b"a")], Next::End), "although the other two are intact");
    }

    #[test]
    fn a_bad_record_before_a_later_batch_is_damage() {
        let first = log(&[]).len();
        for last in [content(1, b"b"), Record::Mark] {
            let mut bytes = log(&[&[content(0, b"a")], &[last]]);
            bytes[first + 33] ^= 1;
            assert!(matches!(read(&bytes), (records, Next::Damaged(_)) if records.is_empty()));
        }
    }

    #[test]
    fn what_a_failed_write_left_is_not_taken_for_a_successor() {
        let failed = log(&[&[content(0, b"a"), content(1, b"left over")]]);
        let written = log(&[&[content(0, b"b")]]);
        let mixed = [&written[..], &failed[written.len()..]].concat();
        assert_eq!(read(&mixed), (vec![content(0, b"b")], Next::End));
    }

    #[test]
    fn frames_that_only_claim_to_be_long_are_not_hashed_for_ever() {
        let mut bytes = log(&[]);
        let length = 4 << 20;
        let mut chain = Chain { sequence: 100, durable: 100, previous: 0 };
        while bytes.len() < length {
            let start = bytes.len();
            chain.append(&Record::Mark, &mut bytes);
            chain.durable = chain.sequence;
            bytes[start..start + 4].copy_from_slice(&(PAYLOAD_MAX as u32).to_le_bytes());
            let crc = crc32c::crc32c(&bytes[start..start + 28]);
            bytes[start + 28..start + 32].copy_from_slice(&crc.to_le_bytes());
        }
        let began = std::time::Instant::now();
        assert!(matches!(read(&bytes), (_, Next::Damaged(_))));
        assert!(began.elapsed() < std::time::Duration::from_secs(2));
    }
}
