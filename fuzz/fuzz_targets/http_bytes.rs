//! Bytes on the API's socket, up to parsed actions: a client's bytes are a request, the beginning
//! of one, or refused, and the boundaries of the reads make no difference.
#![no_main]

use api::http::{MAX_BODY, MAX_HEAD, Parsed, Response, parse};
use api::route::route;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u16, &[u8])| {
    let (cut, mut bytes) = input;
    let cut = usize::from(cut).min(bytes.len());
    if let Ok(Parsed::Whole { request, used }) = parse(&bytes[..cut]) {
        assert_eq!(parse(bytes), Ok(Parsed::Whole { request, used }));
    }
    while let Ok(Parsed::Whole { request, used }) = parse(bytes) {
        assert!(used > 0 && used <= MAX_HEAD + MAX_BODY && used <= bytes.len());
        if let Err(response) = route(&request) {
            assert!((400..=405).contains(&response.status), "{response:?}");
            framed(&response);
        }
        bytes = &bytes[used..];
    }
    if let Err(refusal) = parse(bytes) {
        framed(&refusal.into());
    }
});

/// Checks that no client can insert a line into a response's head.
fn framed(response: &Response) {
    let bytes = response.to_bytes(true, false);
    let head = bytes.windows(4).position(|window| window == b"\r\n\r\n");
    let body = &bytes[head.expect("a head ends") + 4..];
    assert_eq!(body, response.body);
    let fault: serde_json::Value = serde_json::from_slice(body).expect("a fault is JSON");
    assert!(fault["fault_message"].is_string());
}
