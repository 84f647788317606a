//! Bytes that no honest client sends: each connection is answered or closed, and the server
//! goes on.

use crate::support::{Machine, Model};
use api::{Limits, http, route};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use std::io::Write;
use std::net::Shutdown;
use std::time::Duration;

/// Pieces that requests are made of, honest and not.
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

fn hostile_bytes() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(piece(), 0..24).prop_map(|pieces| pieces.concat())
}

fn requests_in(mut bytes: &[u8]) -> Vec<http::Request> {
    let mut requests = Vec::new();
    while let Ok(http::Parsed::Whole { request, used }) = http::parse(bytes) {
        requests.push(request);
        bytes = &bytes[used..];
    }
    requests
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn parsing_and_routing_never_fail_and_use_what_they_say(bytes in hostile_bytes()) {
        if let Ok(http::Parsed::Whole { request, used }) = http::parse(&bytes) {
            prop_assert!(used <= bytes.len() && used <= http::MAX_HEAD + http::MAX_BODY);
            prop_assert!(request.body.len() <= http::MAX_BODY);
        }
        let mut model = Model::default();
        for request in requests_in(&bytes) {
            let response = match route::route(&request) {
                Ok(route) => route::respond(&route.view, model.handle(route.action)),
                Err(response) => response,
            };
            prop_assert!((200..600).contains(&response.status));
        }
    }

    #[test]
    fn a_request_is_the_same_however_its_bytes_arrive(bytes in hostile_bytes(), cut in any::<prop::sample::Index>()) {
        let cut = cut.index(bytes.len() + 1);
        if let Ok(http::Parsed::Whole { used, .. }) = http::parse(&bytes[..cut]) {
            prop_assert_eq!(http::parse(&bytes), http::parse(&bytes[..cut]));
            prop_assert!(used <= cut);
        }
        if let Err(refusal) = http::parse(&bytes[..cut]) {
            // More bytes cannot make sense of what made none, but may show another fault first.
            prop_assert!(http::parse(&bytes).is_err(), "{:?}", refusal);
        }
    }
}

#[test]
fn the_server_outlives_hostile_connections() {
    let limits = Limits {
        drain: Duration::from_millis(5),
        request: Duration::from_millis(20),
        ..Limits::default()
    };
    let machine = Machine::new(limits);
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    for round in 0..2000 {
        let bytes = hostile_bytes().new_tree(&mut runner).unwrap().current();
        let mut connection = machine.connect();
        // The server may close before it has read all.
        let _ = connection.stream.write_all(&bytes);
        let _ = connection.stream.shutdown(Shutdown::Write);
        if round % 3 > 0 {
            let answer = connection.rest();
            assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 "));
        }
    }
    assert_eq!(machine.request("GET", "/version", "").0, 200);
}
