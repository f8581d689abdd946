use std::io::Write;
use std::os::fd::AsFd;

use super::*;

const OPTIONS: QueueOptions =
    QueueOptions { queue: 0, depth: 4, buffer_bytes: 8192, transfer: Transfer::Copy };

#[test]
fn buffers_are_apart_and_ours_until_given_or_lent() {
    let mut queue = Queue::new(OPTIONS).unwrap();
    for tag in 0..4 {
        assert_eq!(queue.buffer_mut(tag).len(), 8192);
        queue.buffer_mut(tag).fill(tag as u8);
    }
    for tag in 0..4 {
        assert!(queue.buffer_mut(tag).iter().all(|byte| *byte == tag as u8));
    }
    let mut lent = queue.lend(2).unwrap();
    assert!(queue.buffer_mut(2).is_empty() && queue.lend(2).is_none() && queue.commit(2, 0).is_err());
    lent.fill(7);
    // From another thread, back by a channel.
    let lent = std::thread::spawn(move || lent).join().unwrap();
    queue.take_back(lent);
    assert_eq!(queue.buffer_mut(2)[8191], 7);
    assert!(queue.buffer_mut(4).is_empty() && queue.lend(4).is_none() && queue.commit(4, 0).is_err());
    assert!(queue.commit_read(0, 8193).is_err());
    assert_eq!(queue.descriptor(0), IoDescriptor::default());
}

#[test]
fn a_buffer_of_another_queue_is_not_taken() {
    let (mut one, mut other) = (Queue::new(OPTIONS).unwrap(), Queue::new(OPTIONS).unwrap());
    let (lent, foreign) = (one.lend(1).unwrap(), other.lend(1).unwrap());
    one.take_back(foreign);
    assert!(one.buffer_mut(1).is_empty());
    one.take_back(lent);
    assert!(!one.buffer_mut(1).is_empty());
}

#[test]
fn a_lent_buffer_outlives_its_queue() {
    let mut queue = Queue::new(OPTIONS).unwrap();
    let mut lent = queue.lend(3).unwrap();
    drop(queue);
    lent.fill(1);
    assert!(lent.iter().all(|byte| *byte == 1));
}

#[test]
fn a_file_that_is_not_ublk_ends_all_tags() {
    for transfer in [Transfer::Copy, Transfer::UserCopy] {
        let file = tempfile::tempfile().unwrap();
        let mut queue = Queue::new(QueueOptions { transfer, ..OPTIONS }).unwrap();
        queue.connect(file.as_fd()).unwrap();
        assert!(queue.buffer_mut(0).is_empty(), "the kernel's");
        queue.fetch_all().unwrap();
        let mut ended = 0;
        while queue.is_open() {
            while let Some(event) = queue.next_event().unwrap() {
                assert!(matches!(event, Event::Ended(_, libc::EOPNOTSUPP)), "{event:?}");
                ended += 1;
            }
            if queue.is_open() {
                queue.wait().unwrap();
            }
        }
        assert_eq!(ended, 4);
    }
}

#[test]
fn files_are_read_into_buffers_and_errors_are_told() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&[9; 6000]).unwrap();
    let write_only = std::fs::File::options().write(true).open("/dev/null").unwrap();
    let mut queue = Queue::new(OPTIONS).unwrap();
    queue.read_file(0, file.as_fd(), 4096, 1000).unwrap();
    queue.read_file(1, file.as_fd(), 4096, 4096).unwrap();
    queue.read_file(2, write_only.as_fd(), 0, 4096).unwrap();
    assert!(queue.buffer_mut(0).is_empty(), "being read into");
    assert!(queue.read_file(3, file.as_fd(), 0, 8193).is_err());
    assert!(queue.read_file_into_request(3, file.as_fd(), 0, 4096).is_err(), "no registered pages");
    let mut events = Vec::new();
    while events.len() < 3 {
        queue.wait().unwrap();
        while let Some(event) = queue.next_event().unwrap() {
            events.push(event);
        }
    }
    for expected in [Event::Moved(0, 1000), Event::Moved(1, 1904), Event::Moved(2, -libc::EBADF)] {
        assert!(events.contains(&expected), "{events:?}");
    }
    assert!(queue.buffer_mut(0)[..1000].iter().all(|byte| *byte == 9));
    assert_eq!(queue.buffer_mut(0)[1000], 0);
}

#[test]
fn waking_ends_a_wait_each_time() {
    let mut queue = Queue::new(OPTIONS).unwrap();
    let waker = queue.waker();
    for _ in 0..3 {
        let waker = waker.clone();
        // Several at once are one.
        std::thread::spawn(move || (0..10).for_each(|_| waker.wake())).join().unwrap();
        queue.wait().unwrap();
        assert_eq!(queue.next_event().unwrap(), Some(Event::Woken));
        assert_eq!(queue.next_event().unwrap(), None);
    }
}

#[test]
fn numbers_beyond_the_limits_are_refused() {
    let cases = [(0, 4096), (wire::DEPTH_MAX + 1, 4096), (1, 100), (1, 0), (1, wire::IO_BYTES_MAX + 4096)];
    for (depth, buffer_bytes) in cases {
        assert!(
            Queue::new(QueueOptions { depth, buffer_bytes, ..OPTIONS }).is_err(),
            "{depth} {buffer_bytes}"
        );
    }
}
