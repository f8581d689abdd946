//! Listeners, limits of connections, and stopping.

use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Command as Process, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use loam_nbd::protocol::{Command, HeaderStyle, NbdError};
use loam_nbd::server::{Listener, Server, ServerOptions};
use loam_nbd::uri::Address;
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::peer::{Peer, Slow, ended, export, filled, request};

struct Running {
    stop: oneshot::Sender<()>,
    served: JoinHandle<std::io::Result<()>>,
}

fn run(server: Arc<Server>, listener: Listener) -> Running {
    let (stop, stopped) = oneshot::channel::<()>();
    let served = tokio::spawn(async move {
        let shutdown = async {
            let _ = stopped.await;
        };
        server.serve(listener, shutdown).await
    });
    Running { stop, served }
}

fn server(delay: Duration, options: ServerOptions) -> Arc<Server> {
    let device = Slow { below: filled(1 << 20), slow_below: 4096, delay };
    Server::new(vec![export("", Arc::new(device))], options).expect("one export")
}

async fn join(socket: &Path) -> Peer {
    let mut peer = Peer::over(UnixStream::connect(socket).await.expect("somebody listens"));
    peer.greet().await;
    peer.go("").await;
    peer
}

#[tokio::test]
async fn unix_and_tcp_serve_alike_and_the_socket_goes_with_the_server() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path().join("socket");
    let server = server(Duration::ZERO, ServerOptions::default());
    let unix = run(server.clone(), Listener::bind(&Address::Unix(path.clone())).await.expect("bind"));
    let address = Address::Tcp { host: "127.0.0.1".into(), port: 0 };
    let listener = Listener::bind(&address).await.expect("bind");
    let bound = listener.tcp_address().expect("an address");
    let tcp = run(server, listener);
    join(&path).await.expect_alive().await;
    let mut peer = Peer::over(TcpStream::connect(bound).await.expect("somebody listens"));
    peer.greet().await;
    peer.negotiate(HeaderStyle::Extended).await;
    peer.go("").await;
    peer.expect_alive().await;
    for running in [unix, tcp] {
        running.stop.send(()).expect("it runs");
        ended(running.served).await.expect("a proper end");
    }
    assert!(!path.exists());
    peer.expect_closed().await;
}

#[tokio::test]
async fn names_of_the_abstract_namespace_need_no_file() {
    let name = format!("\0loam-nbd-test-{}", std::process::id());
    let listener = Listener::bind_unix(Path::new(&name)).expect("bind");
    let running = run(server(Duration::ZERO, ServerOptions::default()), listener);
    join(Path::new(&name)).await.expect_alive().await;
    drop(running.stop);
    ended(running.served).await.expect("a proper end");
}

#[tokio::test]
async fn stopping_answers_what_is_in_flight_refuses_what_comes_and_closes() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path().join("socket");
    let listener = Listener::bind_unix(&path).expect("bind");
    let running = run(server(Duration::from_millis(400), ServerOptions::default()), listener);
    let mut idle = join(&path).await;
    let mut busy = join(&path).await;
    busy.send(&request(Command::Read, 1, 0, 512), &[]).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    running.stop.send(()).expect("it runs");
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(UnixStream::connect(&path).await.is_err(), "nobody listens any more");
    busy.send(&request(Command::Read, 2, 8192, 512), &[]).await;
    busy.send(&request(Command::Write, 3, 8192, 512), &[1; 512]).await;
    let mut errors = Vec::new();
    for _ in 0..3 {
        let (cookie, reply) = busy.reply().await;
        errors.push((cookie, reply.error));
    }
    errors.sort_by_key(|(cookie, _)| *cookie);
    let shutdown = Some(NbdError::Shutdown);
    assert_eq!(errors, [(1, None), (2, shutdown), (3, shutdown)]);
    busy.expect_closed().await;
    idle.expect_closed().await;
    ended(running.served).await.expect("a proper end");
}

#[tokio::test]
async fn stopping_does_not_wait_for_ever() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path().join("socket");
    let options = ServerOptions { stop_timeout: Duration::from_millis(300), ..ServerOptions::default() };
    let listener = Listener::bind_unix(&path).expect("bind");
    let running = run(server(Duration::from_secs(3600), options), listener);
    let mut busy = join(&path).await;
    busy.send(&request(Command::Read, 1, 0, 512), &[]).await;
    let half = UnixStream::connect(&path).await.expect("a client that says nothing");
    tokio::time::sleep(Duration::from_millis(50)).await;
    let begin = Instant::now();
    running.stop.send(()).expect("it runs");
    ended(running.served).await.expect("an end");
    assert!(begin.elapsed() < Duration::from_secs(5));
    busy.expect_closed().await;
    drop(half);
}

#[tokio::test]
async fn a_handshake_does_not_hold_up_a_server_that_stops() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path().join("socket");
    let listener = Listener::bind_unix(&path).expect("bind");
    let running = run(server(Duration::ZERO, ServerOptions::default()), listener);
    let mut peers = Vec::new();
    for says in [&b""[..], b"\0\0\0\x03", b"\0\0\0\x03IHAVEOPT\0\0\0\x07\0\0\x10\0half"] {
        let mut peer = Peer::over(UnixStream::connect(&path).await.expect("somebody listens"));
        let _greeting: [u8; 18] = peer.read().await;
        peer.write(says).await;
        peers.push(peer);
    }
    tokio::time::sleep(Duration::from_millis(50)).await;
    let begin = Instant::now();
    running.stop.send(()).expect("it runs");
    ended(running.served).await.expect("an end");
    assert!(begin.elapsed() < Duration::from_secs(2), "{:?}", begin.elapsed());
    for peer in &mut peers {
        peer.expect_closed().await;
    }
}

#[tokio::test]
async fn one_connection_too_many_is_closed_and_a_place_that_is_left_is_given_again() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path().join("socket");
    let options = ServerOptions { max_connections: 2, ..ServerOptions::default() };
    let listener = Listener::bind_unix(&path).expect("bind");
    let _running = run(server(Duration::ZERO, options), listener);
    let first = join(&path).await;
    let mut second = join(&path).await;
    let mut third = Peer::over(UnixStream::connect(&path).await.expect("somebody listens"));
    third.expect_closed().await;
    drop(first);
    tokio::time::sleep(Duration::from_millis(200)).await;
    join(&path).await.expect_alive().await;
    second.expect_alive().await;
}

/// Serves the sockets of LISTEN_FDS in a process of its own: the test below starts it.
#[tokio::test]
async fn serve_what_systemd_passed() {
    if std::env::var_os("LOAM_TEST_SERVE_PASSED").is_none() {
        return;
    }
    let mut listeners = Listener::from_systemd().expect("sockets");
    assert!(Listener::from_systemd().is_err(), "they can be taken once");
    let server = server(Duration::ZERO, ServerOptions::default());
    let stop = tokio::time::sleep(Duration::from_secs(20));
    server.serve(listeners.pop().expect("one socket"), stop).await.expect("served");
}

#[tokio::test]
async fn sockets_that_systemd_passes_are_served() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path().join("socket");
    let socket = std::os::unix::net::UnixListener::bind(&path).expect("bind");
    // The shell puts the socket where systemd would, and becomes the process that LISTEN_PID names.
    let script = format!(
        "exec 3<&{fd}; export LISTEN_PID=$$; exec \"$0\" --exact sessions::serve_what_systemd_passed --nocapture",
        fd = socket.as_raw_fd()
    );
    rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::empty()).expect("inherited");
    let mut child = Process::new("bash")
        .args(["-c", &script])
        .arg(std::env::current_exe().expect("this program"))
        .env("LISTEN_FDS", "1")
        .env("LOAM_TEST_SERVE_PASSED", "1")
        .stdout(Stdio::null())
        .spawn()
        .expect("a shell");
    join(&path).await.expect_alive().await;
    child.kill().expect("it runs");
    child.wait().expect("it ends");
}
