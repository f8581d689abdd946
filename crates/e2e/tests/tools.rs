//! The tools themselves: a comparison that sees nothing, or a server that is never gone, would make every other test
//! pass.

use std::io::{Read, Write};
use std::net::TcpStream;

use loam_e2e::{FileServer, compare, require_root, tarball};

fn get(server: &FileServer, name: &str, range: &str) -> std::io::Result<Vec<u8>> {
    let address = server.url("").trim_start_matches("http://").trim_end_matches('/').to_string();
    let mut stream = TcpStream::connect(address)?;
    write!(stream, "GET /{name} HTTP/1.1\r\n{range}Connection: close\r\n\r\n")?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(answer)
}

/// GNU tar's extraction is the reference for fidelity, so it has to be faithful itself, and every property that the
/// tree was given has to be seen when it changes.
#[test]
fn the_comparison_sees_every_property_of_the_tree_with_everything() {
    require_root();
    let directory = tempfile::tempdir().unwrap();
    let (tree, tar, copy) =
        (directory.path().join("a"), directory.path().join("t.tar"), directory.path().join("b"));
    tarball::everything(&tree);
    tarball::pack(&tree, &tar);
    tarball::unpack(&tar, &copy);
    let report = compare::trees(&tree, &copy, &[]).unwrap();
    assert_eq!(report.differences, Vec::<String>::new());
    assert!(report.entries > 25, "{report:?}");
    let changes = [
        ("touch -d '2001-02-03 04:05:06.123456788' dir/odd", "mtime"),
        ("chown 1 dir/deep; touch -d '2010-10-10 10:10:10.101010101' dir/deep", "owner"),
        ("setfacl -m u:1000:r-- dir/block", "xattrs"),
        ("printf X | dd of=dir/big bs=1 seek=4999999 conv=notrunc status=none", "content"),
        ("rm -f dir/deep/hard; cp -a dir/big dir/deep/hard", "links"),
        ("rm char; mknod char c 1 5", "device"),
    ];
    for (script, what) in changes {
        tarball::shell(&copy, script);
        let found = compare::trees(&tree, &copy, &[]).unwrap().differences;
        assert!(found.iter().any(|line| line.contains(&format!(": {what}: "))), "{script}: {found:?}");
    }
}

#[test]
fn the_server_serves_ranges_fails_on_demand_and_comes_back_on_its_port() {
    let mut server = FileServer::start();
    server.put("file", b"0123456789".to_vec());
    let answer = String::from_utf8(get(&server, "file", "Range: bytes=2-4\r\n").unwrap()).unwrap();
    assert!(answer.starts_with("HTTP/1.1 206 ") && answer.ends_with("\r\n\r\n234"), "{answer}");
    assert_eq!(server.log()[0].range, Some((2, 4)));
    server.fail_next(1, 503);
    assert!(get(&server, "file", "").unwrap().starts_with(b"HTTP/1.1 503 "));
    server.replace_silently("file", |bytes| bytes[0] = b'X');
    assert!(get(&server, "file", "").unwrap().ends_with(b"X123456789"));
    assert!(get(&server, "other", "").unwrap().starts_with(b"HTTP/1.1 404 "));
    server.stop();
    assert!(get(&server, "file", "").is_err());
    server.resume();
    assert!(get(&server, "file", "").unwrap().ends_with(b"X123456789"));
    assert_eq!(server.counters().requests, 5);
}
