//! An image whose archive lies on a web server: what building it and reading it cost on the wire.

use std::sync::Arc;

use loam_content::{ChunkSource, Digest, HttpClient, HttpOptions, collect_chunks};
use loam_e2e::FileServer;
use loam_e2e::tarball::noise;
use loam_image::{BuildOptions, Error, ImageSource, Index, SourceSpec, build};

fn archive() -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for number in 0..50u64 {
        let data = noise(number, (number * 4000) as usize);
        let mut header = tar::Header::new_gnu();
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, format!("file-{number}"), &data[..]).unwrap();
    }
    builder.into_inner().unwrap()
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

#[test]
fn a_run_of_chunks_is_one_request_and_nothing_is_asked_before() {
    let (server, bytes) = (FileServer::start(), archive());
    server.put("a.tar", bytes.clone());
    let spec: SourceSpec = format!("tar:{}", server.url("a.tar")).parse().unwrap();
    runtime().block_on(async {
        let http = HttpClient::new(HttpOptions::default()).unwrap();
        let options = BuildOptions { http: Some(http.clone()), ..BuildOptions::default() };
        let built = build(&spec, &options, None).await.unwrap();
        assert_eq!(built.report.source_bytes, bytes.len() as u64);
        assert!(built.report.wire.bytes <= bytes.len() as u64 + 1, "{:?}", built.report);
        let index = Arc::new(Index::open(built.index).unwrap());
        assert_eq!(index.blobs()[0].digest, Some(Digest::of(&bytes)));

        let before = server.log().len();
        let source = ImageSource::open(index.clone(), &spec, &http).await.unwrap();
        assert_eq!(server.log().len(), before, "opening asks for nothing");
        let (first, count) = (5, index.chunk_count() - 10);
        let chunks = collect_chunks(&source, first, count).await.unwrap();
        for (number, chunk) in (first..).zip(&chunks) {
            assert_eq!(index.chunk_digest(number), Some(Digest::of(chunk)), "chunk {number}");
        }
        assert_eq!(server.log().len(), before + 1, "one request for neighbouring chunks");
        let content: usize = chunks.iter().map(|chunk| chunk.len()).sum();
        assert!(source.wire().bytes < content as u64 + 64 * 1024, "{:?} for {content}", source.wire());
    });
}

#[test]
fn another_archive_in_its_place_is_not_read() {
    let (server, bytes) = (FileServer::start(), archive());
    server.put("a.tar", bytes.clone());
    let spec: SourceSpec = format!("tar:{}", server.url("a.tar")).parse().unwrap();
    runtime().block_on(async {
        let http = HttpClient::new(HttpOptions::default()).unwrap();
        let index =
            Arc::new(Index::open(build(&spec, &BuildOptions::default(), None).await.unwrap().index).unwrap());
        server.put("a.tar", bytes[..bytes.len() - 512].to_vec());
        let source = ImageSource::open(index, &spec, &http).await.unwrap();
        let error = collect_chunks(&source, 0, 1).await.unwrap_err();
        assert!(matches!(error, loam_content::Error::Changed { .. }), "{error}");
    });
}

#[test]
fn a_download_cut_short_is_an_error() {
    let (server, bytes) = (FileServer::start(), archive());
    server.put("short.tar", bytes[..bytes.len() / 2].to_vec());
    let spec: SourceSpec = format!("tar:{}", server.url("short.tar")).parse().unwrap();
    let error = runtime().block_on(build(&spec, &BuildOptions::default(), None)).unwrap_err();
    assert!(matches!(error, Error::Truncated { .. }), "{error}");
    let spec: SourceSpec = format!("tar:{}", server.url("missing.tar")).parse().unwrap();
    let error = runtime().block_on(build(&spec, &BuildOptions::default(), None)).unwrap_err();
    assert!(matches!(error, Error::Content(loam_content::Error::NotFound { .. })), "{error}");
}
