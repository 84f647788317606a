//! Invalid bytes: each connection is answered or closed, and the server continues.

use crate::bytes::hostile_bytes;
use crate::support::{Machine, Model};
use api::{Limits, http, route};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use std::io::Write;
use std::net::Shutdown;
use std::time::Duration;

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
    fn parsing_and_routing_never_panic_and_consume_the_reported_bytes(bytes in hostile_bytes()) {
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
            // More bytes do not make them valid, but may reveal another fault first.
            prop_assert!(http::parse(&bytes).is_err(), "{:?}", refusal);
        }
    }
}

#[test]
fn the_server_survives_hostile_connections() {
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
        // The server may close before it has read all bytes.
        let _ = connection.stream.write_all(&bytes);
        let _ = connection.stream.shutdown(Shutdown::Write);
        if round % 3 > 0 {
            let answer = connection.rest();
            assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 "));
        }
    }
    assert_eq!(machine.request("GET", "/version", "").0, 200);
}
