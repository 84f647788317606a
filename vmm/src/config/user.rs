//! User of the process while the guest runs.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::Path;
use std::str::FromStr;

use ::devices::host_file;

const PASSWD: &str = "/etc/passwd";
const GROUP: &str = "/etc/group";
/// Upper bound on the bytes that are read of each of these files.
const MAX_DATABASE: usize = 1 << 20;
/// The user and group that chown(2) takes for "unchanged".
const UNCHANGED: u32 = u32::MAX;

/// User and group to which the process changes, never user 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct User {
    uid: u32,
    gid: u32,
}

impl User {
    /// The numbers of user and group.
    #[must_use]
    pub fn ids(self) -> (u32, u32) {
        (self.uid, self.gid)
    }

    /// Finds `text` (`UID[:GID]`, each a number or a name) in the text of
    /// passwd(5) and group(5).
    fn find(text: &str, passwd: &str, group: &str) -> Result<Self, String> {
        let (user, of_group) = match text.split_once(':') {
            Some((user, group)) => (user, Some(group)),
            None => (text, None),
        };
        let entry = entry(passwd, user);
        let uid = number(user).or_else(|| entry.and_then(|fields| number(fields.id)));
        let uid = uid.ok_or_else(|| format!("{PASSWD} has no user {user}; give its number"))?;
        if uid == 0 {
            return Err("user 0 is root; name an unprivileged user".into());
        }
        let gid = match of_group {
            Some(name) => number(name)
                .or_else(|| self::entry(group, name).and_then(|fields| number(fields.id)))
                .ok_or_else(|| format!("{GROUP} has no group {name}; give its number"))?,
            None => entry.and_then(|fields| number(fields.next)).unwrap_or(uid),
        };
        Ok(Self { uid, gid })
    }
}

/// Fields of a line of passwd(5) or group(5).
#[derive(Clone, Copy)]
struct Entry<'a> {
    id: &'a str,
    /// The primary group, in passwd(5).
    next: &'a str,
}

/// Finds an entry by its name or its number.
fn entry<'a>(database: &'a str, key: &str) -> Option<Entry<'a>> {
    database.lines().find_map(|line| {
        let mut fields = line.split(':');
        let (name, _password, id) = (fields.next()?, fields.next()?, fields.next()?);
        let next = fields.next().unwrap_or_default();
        (name == key || id == key).then_some(Entry { id, next })
    })
}

fn number(text: &str) -> Option<u32> {
    text.parse().ok().filter(|number| *number != UNCHANGED)
}

impl FromStr for User {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // Numbers do not need the files, which a root directory may lack.
        let read = |path| host_file::read_text(Path::new(path), MAX_DATABASE).unwrap_or_default();
        Self::find(text, &read(PASSWD), &read(GROUP))
    }
}

impl TryFrom<String> for User {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.uid, self.gid)
    }
}

impl From<User> for String {
    fn from(user: User) -> Self {
        user.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD_TEXT: &str = "root:x:0:0::/root:/bin/sh\nvm:x:990:991::/:/bin/false\n";
    const GROUP_TEXT: &str = "root:x:0:\nkvm:x:104:vm\n";

    fn found(text: &str) -> Result<(u32, u32), String> {
        User::find(text, PASSWD_TEXT, GROUP_TEXT).map(User::ids)
    }

    #[test]
    fn user_is_a_number_or_a_name() {
        assert_eq!(found("1000"), Ok((1000, 1000)));
        assert_eq!(found("1000:2"), Ok((1000, 2)));
        assert_eq!(found("vm"), Ok((990, 991)));
        assert_eq!(found("990"), Ok((990, 991)));
        assert_eq!(found("vm:kvm"), Ok((990, 104)));
        assert_eq!(found("7:kvm"), Ok((7, 104)));
    }

    #[test]
    fn root_and_unknown_users_are_refused_in_one_line() {
        for (text, reason) in [
            ("0", "user 0 is root; name an unprivileged user"),
            ("root", "user 0 is root; name an unprivileged user"),
            ("0:5", "user 0 is root; name an unprivileged user"),
            (
                "nobody2",
                "/etc/passwd has no user nobody2; give its number",
            ),
            (
                "4294967295",
                "/etc/passwd has no user 4294967295; give its number",
            ),
            ("-1", "/etc/passwd has no user -1; give its number"),
            ("", "/etc/passwd has no user ; give its number"),
            ("vm:wheel", "/etc/group has no group wheel; give its number"),
            ("vm:", "/etc/group has no group ; give its number"),
        ] {
            assert_eq!(found(text), Err(reason.into()), "{text}");
        }
    }
}
