//! Bytes that a client may send, valid and invalid.

use proptest::prelude::*;

/// Pieces that requests are made of.
fn piece() -> impl Strategy<Value = Vec<u8>> {
    let tokens: &[&[u8]] = &[
        b"GET ",
        b"PUT ",
        b"PATCH ",
        b"/",
        b"/drives/a",
        b"/machine-config",
        b"/iommu/endpoints/%00/mappings?after=0x",
        b" HTTP/1.1\r\n",
        b" HTTP/1.0\r\n",
        b"Content-Length: 2\r\n",
        b"Content-Length: 51200\r\n",
        b"Content-Length: 99999999999999999999\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Expect: 100-continue\r\n",
        b"Connection: close\r\n",
        b"Host: x\r\n",
        b"\r\n",
        b"\r\n\r\n",
        b"{}",
        b"{\"vcpu_count\": 1e999}",
        b"[[[[[[[[[[",
        b"\"\\ud800\"",
    ];
    prop_oneof![
        8 => prop::sample::select(tokens).prop_map(<[u8]>::to_vec),
        1 => prop::collection::vec(any::<u8>(), 0..40),
        1 => (any::<u8>(), 0usize..9000).prop_map(|(byte, count)| vec![byte; count]),
    ]
}

/// A complete request whose method, path and body may not match. None of them starts or ends a
/// machine, or names a file to write to.
fn request() -> impl Strategy<Value = Vec<u8>> {
    let methods = prop::sample::select(&["GET", "PUT", "PATCH", "DELETE", "HEAD", "BREW"][..]);
    let paths = &[
        "/",
        "/version",
        "/vm/config",
        "/machine-config",
        "/boot-source",
        "/drives/a",
        "/network-interfaces/a",
        "/vsock",
        "/entropy",
        "/serial",
        "/metrics",
        "/iommu",
        "/iommu/endpoints/net0/mappings?limit=1000",
        "/iommu/endpoints/0xffffffff",
        "/drives/%2e%2e%2f",
        "/no/such/thing",
    ][..];
    let bodies = &[
        "",
        "{}",
        "null",
        "[]",
        "{\"vcpu_count\": 2, \"mem_size_mib\": 18446744073709551616}",
        "{\"drive_id\": \"a\", \"path_on_host\": \"\\u0000\"}",
        "{\"iface_id\": \"a\", \"host_dev_name\": \"../../etc\"}",
        "{\"guest_cid\": -3}",
        "{\"model\": \"virtio-iommu\", \"model\": \"none\"}",
        "{\"action_type\": \"InstanceStart\"",
        "{\"boot_args\": \"\u{fffd}\"}",
    ][..];
    let parts = (
        methods,
        prop::sample::select(paths),
        prop::sample::select(bodies),
    );
    parts.prop_map(|(method, path, body)| {
        let length = body.len();
        format!("{method} {path} HTTP/1.1\r\nContent-Length: {length}\r\n\r\n{body}").into_bytes()
    })
}

/// Bytes of one connection.
pub fn hostile_bytes() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        prop::collection::vec(piece(), 0..24),
        prop::collection::vec(request(), 1..8),
        prop::collection::vec(prop_oneof![piece(), request()], 0..16),
    ]
    .prop_map(|parts| parts.concat())
}
