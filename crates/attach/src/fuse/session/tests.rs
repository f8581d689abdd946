use proptest::prelude::*;

use super::*;

const SIZE: u64 = (1 << 40) + (1 << 62);

fn session() -> Session {
    Session::new("loam-test", SIZE, MAX_READ, 256)
}

fn request(opcode: u32, nodeid: u64, body: &[u8]) -> Vec<u8> {
    let len = (size_of::<InHeader>() + body.len()) as u32;
    let header =
        InHeader { len, opcode, unique: 42, nodeid, uid: 0, gid: 0, pid: 1, total_extlen: 0, padding: 0 };
    [header.as_bytes(), body].concat()
}

fn init_request(minor: u32, flags: u64) -> Vec<u8> {
    let offer = InitIn {
        major: 7,
        minor,
        max_readahead: 131_072,
        flags: flags as u32,
        flags2: (flags >> 32) as u32,
        unused: [0; 11],
    };
    request(opcode::INIT, 0, offer.as_bytes())
}

fn read_request(offset: u64, size: u32) -> Vec<u8> {
    let read = ReadIn { fh: 1, offset, size, read_flags: 0, lock_owner: 0, flags: 0, padding: 0 };
    request(opcode::READ, FILE_NODE, read.as_bytes())
}

/// The error in a reply without a body, and that it is one.
fn errno(message: &[u8]) -> i32 {
    let mut reply = [0; REPLY_BYTES];
    assert_eq!(session().handle(message, &mut reply), Action::Reply(16));
    let header = OutHeader::read_from_prefix(&reply).unwrap().0;
    assert_eq!((header.len, header.unique), (16, 42));
    -header.error
}

fn body<T: FromBytes>(message: &[u8]) -> T {
    let mut reply = [0; REPLY_BYTES];
    let length = match session().handle(message, &mut reply) {
        Action::Reply(length) | Action::Begin(length, _) => length,
        other => panic!("{other:?}"),
    };
    let header = OutHeader::read_from_prefix(&reply).unwrap().0;
    assert_eq!((header.len as usize, header.error, header.unique), (length, 0, 42));
    T::read_from_bytes(&reply[16..length]).unwrap()
}

#[test]
fn init_takes_what_is_wanted_of_what_is_offered() {
    let everything = init_request(44, u64::MAX);
    let out: InitOut = body(&everything);
    assert_eq!((out.major, out.minor, out.max_background, out.max_pages), (7, 39, 256, 256));
    assert_eq!(u64::from(out.flags), init::ASYNC_READ | init::ASYNC_DIO | init::MAX_PAGES | init::INIT_EXT);
    assert_eq!(u64::from(out.flags2) << 32, init::HAS_RESEND);
    let mut reply = [0; REPLY_BYTES];
    let Action::Begin(_, agreed) = session().handle(&everything, &mut reply) else { panic!() };
    assert!(agreed.can_resend());
    let Action::Begin(_, agreed) = session().handle(&init_request(38, init::ASYNC_DIO), &mut reply) else {
        panic!()
    };
    assert_eq!(agreed, Negotiated { minor: 38, flags: init::ASYNC_DIO });
    assert!(!agreed.can_resend());
}

#[test]
fn init_without_the_extension_bit_ignores_the_second_word() {
    let mut reply = [0; REPLY_BYTES];
    let Action::Begin(_, agreed) = session().handle(&init_request(44, !init::INIT_EXT), &mut reply) else {
        panic!()
    };
    assert!(!agreed.can_resend());
}

#[test]
fn io_uring_is_taken_only_when_asked_for_and_rules_out_a_resend() {
    let mut reply = [0; REPLY_BYTES];
    let mut session = session();
    session.offer_uring();
    let Action::Begin(_, agreed) = session.handle(&init_request(44, u64::MAX), &mut reply) else { panic!() };
    assert!(agreed.uses_uring() && !agreed.can_resend());
    let offer = init_request(44, !init::OVER_IO_URING);
    let Action::Begin(_, agreed) = session.handle(&offer, &mut reply) else { panic!() };
    assert!(!agreed.uses_uring() && agreed.can_resend());
}

#[test]
fn an_old_kernel_is_refused_and_a_newer_major_is_told_ours() {
    assert_eq!(errno(&init_request(30, 0)), EPROTO);
    let offer = InitIn { major: 8, minor: 0, max_readahead: 0, flags: 0, flags2: 0, unused: [0; 11] };
    let out: InitOut = body(&request(opcode::INIT, 0, offer.as_bytes()));
    assert_eq!(out.major, 7);
    // The 16 bytes of a kernel before 7.36 are enough.
    let out: InitOut =
        body(&request(opcode::INIT, 0, &InitIn { major: 7, minor: 31, ..offer }.as_bytes()[..16]));
    assert_eq!(out.minor, 39);
}

#[test]
fn the_file_is_found_by_its_name_in_the_root_only() {
    let entry: EntryOut = body(&request(opcode::LOOKUP, 1, b"loam-test\0"));
    assert_eq!((entry.nodeid, entry.attr.size, entry.attr.mode), (FILE_NODE, SIZE, 0o100_400));
    assert_eq!(errno(&request(opcode::LOOKUP, 1, b"loam-tes\0")), ENOENT);
    assert_eq!(errno(&request(opcode::LOOKUP, 1, b"")), ENOENT);
    assert_eq!(errno(&request(opcode::LOOKUP, 2, b"loam-test\0")), ENOENT);
}

#[test]
fn attributes_of_both_inodes() {
    let root: AttrOut = body(&request(opcode::GETATTR, 1, &[0; 16]));
    assert_eq!((root.attr.ino, root.attr.mode), (1, 0o040_500));
    let file: AttrOut = body(&request(opcode::GETATTR, 2, &[0; 16]));
    assert_eq!((file.attr.ino, file.attr.size, file.attr.blocks), (2, SIZE, SIZE / 512));
    assert_eq!(errno(&request(opcode::GETATTR, 3, &[0; 16])), ENOENT);
}

#[test]
fn opening_for_reading_only() {
    let out: OpenOut = body(&request(opcode::OPEN, 2, OpenIn { flags: 0, open_flags: 0 }.as_bytes()));
    assert_eq!(out.fh, FILE_HANDLE);
    for write in [1, 2] {
        let open = OpenIn { flags: write, open_flags: 0 };
        assert_eq!(errno(&request(opcode::OPEN, 2, open.as_bytes())), EROFS);
    }
    assert_eq!(errno(&request(opcode::OPEN, 2, &[])), EINVAL);
    assert_eq!(errno(&request(opcode::OPEN, 1, &[0; 8])), EISDIR);
}

#[test]
fn reads_end_where_the_file_ends() {
    let mut reply = [0; REPLY_BYTES];
    let mut lengths = |offset, size| match session().handle(&read_request(offset, size), &mut reply) {
        Action::Read { unique: 42, offset: at, length } if at == offset => length,
        other => panic!("{other:?}"),
    };
    assert_eq!(lengths(0, 4096), 4096);
    assert_eq!(lengths(SIZE - 4096, 8192), 4096);
    assert_eq!(lengths(SIZE, 4096), 0);
    assert_eq!(lengths(u64::MAX, 4096), 0);
    assert_eq!(lengths(0, u32::MAX), MAX_READ);
    assert_eq!(errno(&request(opcode::READ, 2, &[0; 39])), EINVAL);
    assert_eq!(errno(&request(opcode::READ, 1, &[0; 40])), EISDIR);
}

#[test]
fn requests_are_no_longer_than_the_device_takes() {
    for (limit, pages) in [(0, 1), (4096, 1), (70_000, 17), (u32::MAX, 256)] {
        let session = Session::new("loam-test", SIZE, limit, 256);
        let mut reply = [0; REPLY_BYTES];
        assert!(matches!(session.handle(&init_request(44, u64::MAX), &mut reply), Action::Begin(..)));
        let out = InitOut::read_from_prefix(&reply[16..]).unwrap().0;
        assert_eq!(out.max_pages, pages);
    }
}

#[test]
fn a_resent_request_is_answered_under_its_own_number() {
    let mut message = read_request(0, 4096);
    let unique = 42 | wire::UNIQUE_RESEND;
    message[8..16].copy_from_slice(&unique.to_ne_bytes());
    let action = session().handle(&message, &mut [0; REPLY_BYTES]);
    assert_eq!(action, Action::Read { unique, offset: 0, length: 4096 });
    assert_eq!(data_header(unique, 4096), OutHeader { len: 4112, error: 0, unique });
}

#[test]
fn nothing_can_be_changed() {
    for opcode in [opcode::WRITE, opcode::SETATTR, opcode::CREATE, opcode::UNLINK, opcode::FALLOCATE] {
        assert_eq!(errno(&request(opcode, 2, &[0; 64])), EROFS);
    }
}

#[test]
fn unknown_operations_are_not_implemented_and_some_want_no_answer() {
    for opcode in [0, 52, 4096, u32::MAX] {
        assert_eq!(errno(&request(opcode, 2, &[])), ENOSYS);
    }
    for opcode in [opcode::FORGET, opcode::BATCH_FORGET, opcode::INTERRUPT] {
        let action = session().handle(&request(opcode, 2, &[]), &mut [0; REPLY_BYTES]);
        assert_eq!(action, Action::Nothing);
    }
}

#[test]
fn a_message_that_was_cut_is_refused() {
    let message = read_request(0, 4096);
    assert_eq!(errno(&message[..message.len() - 1]), EPROTO);
    assert_eq!(session().handle(&message[..39], &mut [0; REPLY_BYTES]), Action::Malformed);
    assert_eq!(session().handle(&[], &mut [0; REPLY_BYTES]), Action::Malformed);
}

fn check(message: &[u8]) -> Result<(), TestCaseError> {
    let mut reply = [0; REPLY_BYTES];
    match session().handle(message, &mut reply) {
        Action::Reply(length) | Action::Begin(length, _) => {
            let header = OutHeader::read_from_prefix(&reply).unwrap().0;
            prop_assert_eq!(header.len as usize, length);
            // What the kernel accepts as an error number.
            prop_assert!(header.error <= 0 && header.error > -512);
            prop_assert!(header.error == 0 || length == 16);
        }
        Action::Read { offset, length, .. } => {
            prop_assert!(length <= MAX_READ);
            prop_assert!(length == 0 || offset + u64::from(length) <= SIZE);
        }
        Action::Nothing => {}
        Action::Malformed => prop_assert!(message.len() < size_of::<InHeader>()),
    }
    Ok(())
}

proptest! {
    #[test]
    fn any_bytes_are_answered_within_bounds(message in proptest::collection::vec(any::<u8>(), 0..200)) {
        check(&message)?;
    }

    #[test]
    fn any_well_framed_request_is_answered_within_bounds(
        opcode in 0_u32..64,
        nodeid in 0_u64..4,
        body in proptest::collection::vec(any::<u8>(), 0..200),
    ) {
        check(&request(opcode, nodeid, &body))?;
    }

    #[test]
    fn a_good_request_with_some_bytes_changed_is_answered_within_bounds(
        which in 0_usize..4,
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let mut message = [
            read_request(1 << 40, 4096),
            init_request(44, u64::MAX),
            request(opcode::LOOKUP, 1, b"loam-test\0"),
            request(opcode::OPEN, 2, &[0; 8]),
        ][which].clone();
        for (index, byte) in changes {
            let index = index.index(message.len());
            message[index] = byte;
        }
        check(&message)?;
    }
}
