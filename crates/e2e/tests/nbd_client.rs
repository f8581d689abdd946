//! The client against the other servers.

mod nbd_support;

use nbd_support::{nbd_server, nbdkit, qemu_nbd};

#[test]
fn peers_start_and_are_gone() {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(1 << 20).unwrap();
    let path = image.path().to_str().unwrap();
    let mut peers = [
        nbdkit(&["memory", "1M"]),
        qemu_nbd(&["-f", "raw", path]),
        nbd_server(&format!("[disk]\nexportname = {path}\n")),
    ];
    for peer in &mut peers {
        let process = format!("/proc/{}", peer.pid());
        assert!(std::fs::exists(&process).unwrap());
        peer.kill();
        peer.restart();
        peer.kill();
        std::thread::sleep(std::time::Duration::from_millis(20));
        let status = std::fs::read_to_string(format!("/proc/{}/status", peer.pid()));
        assert!(status.is_err() || status.unwrap().contains("Z (zombie)"), "{}", peer.uri());
    }
}
