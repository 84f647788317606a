//! HTTP/1.1 (RFC 9112) for an API over a local socket: bytes to requests, responses to bytes.
//! Without chunked bodies.

use std::fmt::Write as _;

/// Upper bound on the bytes of a request line and header fields together.
pub const MAX_HEAD: usize = 8 << 10;

/// Upper bound on the bytes of a request body: Firecracker's default.
pub const MAX_BODY: usize = 51_200;

/// Upper bound on the number of header fields.
const MAX_HEADERS: usize = 64;

/// A complete request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The method, unchanged: methods are case-sensitive.
    pub method: String,
    /// The target, unchanged: path and query, not decoded.
    pub target: String,
    /// As many bytes as Content-Length says; none without it.
    pub body: Vec<u8>,
    /// Whether the connection serves another request after this one.
    pub keep_alive: bool,
}

/// Error of a request that cannot be parsed. The rest of the connection cannot be parsed either:
/// answer and close.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The status code to answer with.
    pub status: u16,
    /// The fault, in one line.
    pub message: String,
}

impl Refusal {
    fn new(status: u16, message: impl Into<String>) -> Self {
        Self {
            status,
            message: message.into(),
        }
    }
}

/// Result of [`parse`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// The start of a request.
    Partial {
        /// The head is complete, and the client waits for `100 Continue` before it sends the body.
        wants_continue: bool,
    },
    /// A complete request.
    Whole {
        /// Head and body, parsed.
        request: Request,
        /// Bytes of the request; the next request follows them.
        used: usize,
    },
}

/// Fields of the head that frame the body.
struct Framing {
    body_len: usize,
    keep_alive: bool,
    expects_continue: bool,
}

/// Parses the first request in `bytes`. It keeps no state: call it again with more bytes.
///
/// # Errors
/// The bytes cannot be the start of a valid request.
pub fn parse(bytes: &[u8]) -> Result<Parsed, Refusal> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut head = httparse::Request::new(&mut headers);
    let window = bytes.get(..MAX_HEAD).unwrap_or(bytes);
    let head_len = match head.parse(window) {
        Ok(httparse::Status::Complete(len)) => len,
        Ok(httparse::Status::Partial) if bytes.len() < MAX_HEAD => {
            return Ok(Parsed::Partial {
                wants_continue: false,
            });
        }
        Ok(httparse::Status::Partial) => {
            return Err(Refusal::new(431, "the request head is longer than 8 KiB"));
        }
        Err(httparse::Error::TooManyHeaders) => {
            return Err(Refusal::new(431, "more than 64 header fields"));
        }
        Err(httparse::Error::Version) => {
            return Err(Refusal::new(505, "only HTTP/1.1 and HTTP/1.0 are served"));
        }
        Err(error) => return Err(Refusal::new(400, format!("not an HTTP request: {error}"))),
    };
    let framing = framing(&head)?;
    let end = head_len + framing.body_len;
    let Some(body) = bytes.get(head_len..end) else {
        return Ok(Parsed::Partial {
            wants_continue: framing.expects_continue && bytes.len() == head_len,
        });
    };
    let request = Request {
        method: head.method.unwrap_or_default().to_owned(),
        target: head.path.unwrap_or_default().to_owned(),
        body: body.to_vec(),
        keep_alive: framing.keep_alive,
    };
    Ok(Parsed::Whole { request, used: end })
}

fn framing(head: &httparse::Request<'_, '_>) -> Result<Framing, Refusal> {
    let http_1_1 = head.version == Some(1);
    let mut framing = Framing {
        body_len: 0,
        keep_alive: http_1_1,
        expects_continue: false,
    };
    let mut content_length = None;
    for header in head.headers.iter() {
        let name = header.name;
        if name.eq_ignore_ascii_case("content-length") {
            // Two equal ones are refused too: they serve to smuggle requests past a proxy.
            if content_length.replace(header.value).is_some() {
                return Err(Refusal::new(400, "Content-Length is given twice"));
            }
            framing.body_len = parse_length(header.value)?;
        } else if name.eq_ignore_ascii_case("transfer-encoding") {
            return Err(Refusal::new(
                501,
                "Transfer-Encoding is not supported; send a Content-Length",
            ));
        } else if name.eq_ignore_ascii_case("connection") {
            for token in header.value.split(|&byte| byte == b',') {
                let token = token.trim_ascii();
                if token.eq_ignore_ascii_case(b"close") {
                    framing.keep_alive = false;
                } else if token.eq_ignore_ascii_case(b"keep-alive") && !http_1_1 {
                    framing.keep_alive = true;
                }
            }
        } else if name.eq_ignore_ascii_case("expect") {
            if !header.value.eq_ignore_ascii_case(b"100-continue") {
                return Err(Refusal::new(417, "the only Expect served is 100-continue"));
            }
            framing.expects_continue = http_1_1;
        }
    }
    Ok(framing)
}

/// Reads a Content-Length: digits and nothing else (RFC 9110 §8.6).
fn parse_length(value: &[u8]) -> Result<usize, Refusal> {
    if value.is_empty() || !value.iter().all(u8::is_ascii_digit) {
        return Err(Refusal::new(400, "Content-Length is not a number"));
    }
    // A number beyond `usize` is too long too.
    let length = std::str::from_utf8(value)
        .ok()
        .and_then(|digits| digits.parse().ok())
        .unwrap_or(usize::MAX);
    if length > MAX_BODY {
        return Err(Refusal::new(413, "the body is longer than 51200 bytes"));
    }
    Ok(length)
}

/// A response, without the connection's own headers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// The status code.
    pub status: u16,
    /// The media type of `body`.
    pub content_type: &'static str,
    /// The body; none is sent with status 204.
    pub body: Vec<u8>,
    /// Methods of the resource, with status 405.
    pub allow: Option<&'static str>,
}

impl Response {
    /// Creates a response 204, without a body.
    #[must_use]
    pub fn no_content() -> Self {
        Self::with_body(204, "", Vec::new())
    }

    /// Creates a response 200 with text of the given media type.
    #[must_use]
    pub fn text(content_type: &'static str, body: String) -> Self {
        Self::with_body(200, content_type, body.into_bytes())
    }

    /// Creates a response 200 with a JSON document.
    #[must_use]
    pub fn json(value: &impl serde::Serialize) -> Self {
        match serde_json::to_vec(value) {
            Ok(body) => Self::with_body(200, "application/json", body),
            Err(error) => Self::fault(500, &format!("the answer cannot be written: {error}")),
        }
    }

    /// Creates an error response in Firecracker's form.
    #[must_use]
    pub fn fault(status: u16, message: &str) -> Self {
        let body = serde_json::json!({ "fault_message": message }).to_string();
        Self::with_body(status, "application/json", body.into_bytes())
    }

    /// Creates a response 405 that lists the methods of the resource.
    #[must_use]
    pub fn method_not_allowed(message: &str, allow: &'static str) -> Self {
        Self {
            allow: Some(allow),
            ..Self::fault(405, message)
        }
    }

    fn with_body(status: u16, content_type: &'static str, body: Vec<u8>) -> Self {
        Self {
            status,
            content_type,
            body,
            allow: None,
        }
    }

    /// Serializes the response. A `HEAD` request permits the head only.
    #[must_use]
    pub fn to_bytes(&self, keep_alive: bool, head_only: bool) -> Vec<u8> {
        let mut head = format!("HTTP/1.1 {} {}\r\n", self.status, reason(self.status));
        head.push_str("Server: portcullis\r\n");
        let connection = if keep_alive { "keep-alive" } else { "close" };
        // Writing to a String does not fail.
        let _ = write!(head, "Connection: {connection}\r\n");
        if let Some(allow) = self.allow {
            let _ = write!(head, "Allow: {allow}\r\n");
        }
        if self.status != 204 {
            let _ = write!(
                head,
                "Content-Type: {}\r\nContent-Length: {}\r\n",
                self.content_type,
                self.body.len()
            );
        }
        head.push_str("\r\n");
        let mut bytes = head.into_bytes();
        if self.status != 204 && !head_only {
            bytes.extend_from_slice(&self.body);
        }
        bytes
    }
}

impl From<Refusal> for Response {
    fn from(refusal: Refusal) -> Self {
        Self::fault(refusal.status, &refusal.message)
    }
}

/// The interim response that a client with `Expect: 100-continue` waits for.
pub const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        204 => "No Content",
        400 => "Bad Request",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        413 => "Content Too Large",
        417 => "Expectation Failed",
        431 => "Request Header Fields Too Large",
        500 => "Internal Server Error",
        501 => "Not Implemented",
        503 => "Service Unavailable",
        505 => "HTTP Version Not Supported",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(bytes: &[u8]) -> u16 {
        parse(bytes).unwrap_err().status
    }

    fn whole(bytes: &[u8]) -> (Request, usize) {
        match parse(bytes).unwrap() {
            Parsed::Whole { request, used } => (request, used),
            partial => panic!("{partial:?}"),
        }
    }

    const PUT: &[u8] = b"PUT /vm?x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\nbody";

    #[test]
    fn a_request_is_partial_at_every_split_and_whole_at_its_end() {
        for end in 0..PUT.len() {
            let parsed = parse(&PUT[..end]).unwrap();
            assert!(matches!(parsed, Parsed::Partial { .. }), "at {end}");
        }
        let (request, used) = whole(PUT);
        assert_eq!(used, PUT.len());
        assert_eq!(
            (request.method.as_str(), request.target.as_str()),
            ("PUT", "/vm?x")
        );
        assert_eq!(request.body, b"body");
    }

    #[test]
    fn bytes_after_a_request_are_left_for_the_next() {
        let two = [PUT, b"GET / HTTP/1.1\r\n\r\n"].concat();
        let (_, used) = whole(&two);
        let (second, _) = whole(&two[used..]);
        assert_eq!(second.method, "GET");
        assert!(second.body.is_empty());
    }

    #[test]
    fn connections_stay_open_as_the_version_and_the_header_say() {
        let keep = |head: &str| whole(head.as_bytes()).0.keep_alive;
        assert!(keep("GET / HTTP/1.1\r\n\r\n"));
        assert!(!keep("GET / HTTP/1.0\r\n\r\n"));
        assert!(!keep("GET / HTTP/1.1\r\nconnection: foo, Close\r\n\r\n"));
        assert!(keep("GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n"));
        assert!(!keep(
            "GET / HTTP/1.1\r\nConnection: close\r\nConnection: keep-alive\r\n\r\n"
        ));
    }

    #[test]
    fn ambiguous_or_unsupported_framing_is_refused() {
        let with = |field: &str| {
            refusal(format!("PUT / HTTP/1.1\r\n{field}\r\nContent-Length: 1\r\n\r\nx").as_bytes())
        };
        assert_eq!(with("Content-Length: 1"), 400);
        assert_eq!(with("Transfer-Encoding: chunked"), 501);
        assert_eq!(with("Expect: a-miracle"), 417);
        let length = |value: &str| {
            refusal(format!("PUT / HTTP/1.1\r\nContent-Length: {value}\r\n\r\n").as_bytes())
        };
        for value in ["+1", "-1", "1 1", "0x1", "1,1", ""] {
            assert_eq!(length(value), 400, "{value}");
        }
        for value in ["51201", "18446744073709551616", "99999999999999999999999"] {
            assert_eq!(length(value), 413, "{value}");
        }
    }

    #[test]
    fn bytes_that_are_no_request_are_refused() {
        assert_eq!(refusal(b"\x16\x03\x01 TLS"), 400);
        assert_eq!(refusal(b"GET / HTTP/2.0\r\n\r\n"), 505);
        assert_eq!(refusal(b"GET / HTTP/1.1\r\nbad header\r\n\r\n"), 400);
        assert_eq!(refusal(b"GET / HTTP/1.1\r\nfolded: a\r\n b\r\n\r\n"), 400);
    }

    #[test]
    fn heads_are_bounded_in_bytes_and_fields() {
        let long = format!("GET / HTTP/1.1\r\nA: {}", "a".repeat(MAX_HEAD));
        assert_eq!(refusal(long.as_bytes()), 431);
        assert_eq!(refusal(format!("{long}\r\n\r\n").as_bytes()), 431);
        let fields = "A: b\r\n".repeat(MAX_HEADERS + 1);
        assert_eq!(
            refusal(format!("GET / HTTP/1.1\r\n{fields}\r\n").as_bytes()),
            431
        );
    }

    #[test]
    fn continue_is_wanted_once_the_head_is_there_and_no_body_is() {
        let head = b"PUT / HTTP/1.1\r\nExpect: 100-Continue\r\nContent-Length: 2\r\n\r\n";
        let wants = |bytes: &[u8]| parse(bytes).unwrap();
        let partial = |wants_continue| Parsed::Partial { wants_continue };
        assert_eq!(wants(&head[..40]), partial(false));
        assert_eq!(wants(head), partial(true));
        assert_eq!(wants(&[head, &b"x"[..]].concat()), partial(false));
        let old = b"PUT / HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n";
        assert_eq!(wants(old), partial(false));
    }

    #[test]
    fn responses_frame_their_bodies() {
        let text = |response: &Response, keep, head| {
            String::from_utf8(response.to_bytes(keep, head)).unwrap()
        };
        let fault = Response::fault(400, "a \"quoted\" thing");
        let sent = text(&fault, true, false);
        assert!(sent.starts_with("HTTP/1.1 400 Bad Request\r\n"), "{sent}");
        let body = r#"{"fault_message":"a \"quoted\" thing"}"#;
        assert!(sent.ends_with(&format!("Content-Length: {}\r\n\r\n{body}", body.len())));
        assert!(text(&fault, true, true).ends_with("\r\n\r\n"));
        let done = text(&Response::no_content(), false, false);
        assert!(done.contains("Connection: close") && !done.contains("Content-Length"));
        let refused = Response::method_not_allowed("no", "GET, PUT");
        assert!(text(&refused, true, false).contains("Allow: GET, PUT\r\n"));
    }
}
